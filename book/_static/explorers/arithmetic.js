// What the explorers compute with: the rules of `companion`, in the same order of operations, so that the numbers on a
// page are those of the package. tests/book/test_explorers.py compares them. Nothing in this file knows of the page.
{
  /** Explicit Runge–Kutta methods, as in companion.gradient_flow.TABLEAUX, without stages that no step needs. */
  const METHODS = {
    euler: { a: [[]], b: [1] },
    heun: { a: [[], [1]], b: [1 / 2, 1 / 2] },
    extragradient: { a: [[], [1]], b: [0, 1] },
    kutta3: { a: [[], [1 / 2], [-1, 2]], b: [1 / 6, 2 / 3, 1 / 6] },
    rk4: { a: [[], [1 / 2], [0, 1 / 2], [0, 0, 1]], b: [1 / 6, 1 / 3, 1 / 3, 1 / 6] },
    rk45: {
      a: [
        [],
        [1 / 5],
        [3 / 40, 9 / 40],
        [44 / 45, -56 / 15, 32 / 9],
        [19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729],
        [9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656],
      ],
      b: [35 / 384, 0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84],
    },
  };

  /** Follows θ' = -∇L(θ) in fixed steps. Returns the trajectory, steps + 1 points of two weights. */
  function integrate(gradient, start, h, steps, { a, b }) {
    const path = [start];
    const ahead = ([x, y], weights, slopes) => {
      let alongX = 0;
      let alongY = 0;
      for (let j = 0; j < weights.length; j++) {
        alongX += weights[j] * slopes[j][0];
        alongY += weights[j] * slopes[j][1];
      }
      return [x - h * alongX, y - h * alongY];
    };
    for (let step = 0; step < steps; step++) {
      const slopes = [];
      for (const row of a) slopes.push(gradient(ahead(path[step], row, slopes)));
      path.push(ahead(path[step], b, slopes));
    }
    return path;
  }

  /** The path of companion.Momentum with two weights. Keras keeps the rate and β in float32, and so does this. */
  function momentum(gradient, start, rate, beta, steps, nesterov) {
    const [h, b] = [Math.fround(rate), Math.fround(beta)];
    const path = [start];
    let velocity = [0, 0];
    for (let step = 0; step < steps; step++) {
      const [x, y] = path[step];
      const [p, q] = gradient(path[step]);
      const [u, v] = [velocity[0] * b - p * h, velocity[1] * b - q * h];
      path.push(nesterov ? [x + (u * b - p * h), y + (v * b - q * h)] : [x + u, y + v]);
      velocity = [u, v];
    }
    return path;
  }

  /** What a step of momentum multiplies the distance by in the long run, on a curvature λ. */
  function radius(hLambda, beta, nesterov) {
    // On a quadratic Nesterov's form is momentum with β(1 - hλ) in the place of β.
    const memory = nesterov ? beta * (1 - hLambda) : beta;
    const half = (1 + memory - hLambda) / 2;
    const square = half * half - memory;
    return square < 0 ? Math.sqrt(memory) : Math.abs(half) + Math.sqrt(square);
  }

  /** The first-order Chebyshev method, as a recurrence: (μ, ν, μ̃) of each stage. */
  function chebyshev(stages, damping = 0.05) {
    const centre = 1 + damping / stages ** 2;
    const [value, slope] = [
      [1, centre],
      [0, 1],
    ]; // of Chebyshev's polynomials there
    for (let j = 2; j <= stages; j++) {
      value.push(2 * centre * value[j - 1] - value[j - 2]);
      slope.push(2 * value[j - 1] + 2 * centre * slope[j - 1] - slope[j - 2]);
    }
    const scale = value[stages] / slope[stages];
    const recurrence = [[1, 0, scale / centre]];
    for (let j = 2; j <= stages; j++) {
      const share = (2 * value[j - 1]) / value[j];
      recurrence.push([centre * share, 1 - centre * share, scale * share]);
    }
    return { recurrence };
  }

  // The coefficients of R(z) = 1 + Σ zᵏ b Aᵏ⁻¹ 1, what one step of a tableau multiplies a mode by.
  for (const method of Object.values(METHODS)) {
    const times = (weights, vector) => weights.reduce((sum, weight, j) => sum + weight * vector[j], 0);
    method.coefficients = [1];
    let vector = method.b.map(() => 1);
    for (const _ of method.b) {
      method.coefficients.push(times(method.b, vector));
      vector = method.a.map((row) => times(row, vector));
    }
  }

  /** R(z) of a method at z = x + iy, as [real, imaginary]. */
  function factor({ recurrence, coefficients }, x, y) {
    let [real, imaginary, realBefore, imaginaryBefore] = [recurrence ? 1 : 0, 0, 0, 0];
    const turn = (shift, back, step, rest) => {
      const [nextReal, nextImaginary] = [
        (shift + step * x) * real - step * y * imaginary + back * realBefore + rest,
        (shift + step * x) * imaginary + step * y * real + back * imaginaryBefore,
      ];
      [realBefore, imaginaryBefore, real, imaginary] = [real, imaginary, nextReal, nextImaginary];
    };
    if (recurrence) for (const [mu, nu, step] of recurrence) turn(mu, nu, step, 0);
    else for (let k = coefficients.length - 1; k >= 0; k--) turn(0, 0, 1, coefficients[k]);
    return [real, imaginary];
  }

  /** How many gradients a step costs. */
  const gradients = (method) => (method.recurrence ?? method.b).length;

  /** How far z may go before a mode grows: down the real axis, or along (-x, y). */
  function limit(method, x = 1, y = 0) {
    const grows = (distance) => Math.hypot(...factor(method, -distance * x, distance * y)) > 1 + 1e-11;
    const stride = 0.02 * gradients(method); // the factor's waves are much longer
    let stable = 0;
    while (!grows(stable + stride)) stable += stride;
    for (let gap = stride; gap > 1e-12; gap /= 2) if (!grows(stable + gap / 2)) stable += gap / 2;
    return stable;
  }

  /** Python's round: halves go to the even neighbour. */
  const round = (x) => (x % 1 === 0.5 ? 2 * Math.round(x / 2) : Math.round(x));

  /** A fraction in lowest terms, of integers. */
  function fraction(numerator, denominator) {
    let [a, b] = [numerator, denominator];
    while (b) [a, b] = [b, a % b];
    return denominator === a ? `${numerator / a}` : `${numerator / a}/${denominator / a}`;
  }

  globalThis.explorers = {
    TABLEAUX: METHODS,
    integrate,
    momentum,
    radius,
    chebyshev,
    factor,
    gradients,
    limit,
    round,
    fraction,
  };
}
