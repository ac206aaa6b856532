"""The environment in which notebooks run: the same for the tool that executes and the tests that compare them."""

import os
import pathlib
import tempfile

_KERNEL_CONFIG = "c = get_config()\nc.IPKernelApp.capture_fd_output = False\n"


def prepare_environment() -> None:
    """Sets what kernels inherit: no banner of TensorFlow's in a cell's output, the same digits on every processor."""
    directory = pathlib.Path(tempfile.mkdtemp(prefix="ipython-"))
    profile = directory / "profile_default"
    profile.mkdir()
    (profile / "ipython_kernel_config.py").write_text(_KERNEL_CONFIG)
    os.environ["IPYTHONDIR"] = str(directory)
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")
    os.environ.setdefault("PYTHONHASHSEED", "0")
