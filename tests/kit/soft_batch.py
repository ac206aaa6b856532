"""What is known of the soft batch of 2018: the recorded runs, and its graphs as TensorFlow serialises them."""

import functools
import json
from typing import Any

import tensorflow as tf

from companion import legacy
from tests.kit import ROOT


@functools.cache
def record() -> dict[str, Any]:
    """What tests/benchmarks/race_soft_batch.py wrote."""
    return json.loads((ROOT / "book" / "data" / "soft_batch_race.json").read_text())


def recorded(variant: str, variables: str, size: int) -> dict[str, Any]:
    (result,) = [
        entry
        for entry in record()["results"]
        if (entry["variant"], entry["variables"], entry["size"]) == (variant, variables, size)
    ]
    return result


def upstream(graph: tf.Graph, name: str) -> set[str]:
    """The names of all nodes that a node waits for, from the serialised graph."""
    nodes = {node.name: node for node in graph.as_graph_def().node}
    found: set[str] = set()
    waiting = [name]
    while waiting:
        for entry in nodes[waiting.pop()].input:
            earlier = entry.lstrip("^").partition(":")[0]
            if earlier not in found:
                found.add(earlier)
                waiting.append(earlier)
    return found


def writes(graph: tf.Graph) -> list[str]:
    in_step = upstream(graph, "step")
    return [node.name for node in graph.as_graph_def().node if "Assign" in node.op and node.name in in_step]


def drawn_and_true_edges(axes: dict[str, Any], variant: str) -> tuple[set[Any], set[Any]]:
    """The edges that a chapter's figure draws between named operations, and those that the graph has."""
    drawn = {tuple(entry["label"].split(" → ")) for entry in axes["lines"]}
    graph = legacy.soft_batch_graph(3, 3.0, variant)
    named = {name for edge in drawn for name in edge} | set(writes(graph))
    nodes = {node.name: node for node in graph.as_graph_def().node}

    def direct(name: str) -> set[str]:
        """The named nodes that a node waits for with no other named node between."""
        earlier = {entry.lstrip("^").partition(":")[0] for entry in nodes[name].input}
        return {before for before in earlier if before in named}.union(*(direct(b) for b in earlier - named))

    return drawn, {(before, name) for name in named for before in direct(name)}
