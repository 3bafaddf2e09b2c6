"""Models what the all-reduces of batch normalization cost a ResNet-50 step on 256 and 4,096 chips.

This is a model, not a measurement. Its assumptions and their sources are in experiments/bench/README.md; the only
number from our own results is the memory traffic of the compiled step (`results/aot.jsonl`).
"""

import math
from typing import NamedTuple

from experiments import jsonl
from experiments.bench import report

LAYERS, CHANNELS = 53, 26_560  # of ResNet-50: its normalisations, and their channels together
IMAGES = 256  # on the chip for which the step was compiled
BATCHES = (256, 32, 8)  # images per chip in the table

HOP = 1e-6  # s, along one link of a TPU's torus
LAUNCH, NVLINK, NETWORK = 6.8e-6, 0.6e-6, 5.0e-6  # s, of NCCL's tree for small payloads: once, and per step
GPUS = 8  # of a node


class Pod(NamedTuple):
    """A group of chips that share statistics."""

    name: str
    latency: float  # s, of an all-reduce of a few bytes
    link: float  # bytes/s, in one direction
    memory: float  # bytes/s of a chip
    step: str  # the target that the training step was compiled for


def torus(*sides: int) -> float:
    """Returns the latency of an all-reduce on a torus: scatter and gather, half way round each ring, in both
    directions.
    """
    return 2 * sum(side / 2 for side in sides) * HOP


def tree(nodes: int) -> float:
    """Returns the latency of an all-reduce of NCCL: up and down a chain of GPUs in each node and a binary tree of
    nodes.
    """
    return LAUNCH + 2 * ((GPUS - 1) * NVLINK + math.log2(nodes) * NETWORK)


V5E, V5P, H100 = (50e9, 819e9, "v5e:2x2"), (100e9, 2765e9, "v5e:2x2"), (50e9, 3350e9, "h100")
PODS = (
    Pod("256 TPU v5e, 16×16", torus(16, 16), *V5E),
    Pod("… groups of 16: one axis", torus(16), *V5E),
    Pod("4,096 TPU v5p, 16×16×16", torus(16, 16, 16), *V5P),
    Pod("… groups of 256: two axes", torus(16, 16), *V5P),
    Pod("… groups of 16: one axis", torus(16), *V5P),
    Pod("256 H100, 32 nodes", tree(32), *H100),
    Pod("4,096 H100, 512 nodes", tree(512), *H100),
    Pod("… groups of 8: a node", tree(1), *H100),
)


def all_reduces(pod: Pod) -> float:
    """Returns the seconds that all-reduces take in a step: two per layer, of two float32 per channel, sent twice."""
    return 2 * (LAYERS * pod.latency + 2 * 2 * CHANNELS * 4 / pod.link)


def traffic_of_an_image(target: str) -> float:
    """Returns the bytes per image that the compiled training step moves."""
    rows = jsonl.read(report.RESULTS / "aot.jsonl")
    (step,) = [r for r in rows if (r["program"], r["norm"], r["target"]) == ("ResNet-50 step", "bnjax", target)]
    return float(step["traffic"]) * 1e9 / IMAGES


def share(pod: Pod, images: int) -> float:
    """Returns an upper bound of the all-reduces' share of a step: nothing overlaps, and the rest is limited by memory
    traffic.
    """
    rest = images * traffic_of_an_image(pod.step) / pod.memory
    return all_reduces(pod) / (all_reduces(pod) + rest)


def table() -> str:
    """Makes a Markdown table with a row for each pod."""
    head = ["statistics over", "an all-reduce, µs", f"{2 * LAYERS} of them, ms"]
    lines = []
    for pod in PODS:
        total = all_reduces(pod)
        shares = (f"{share(pod, b):.1%}" for b in BATCHES)
        lines.append((pod.name, f"{total / (2 * LAYERS) * 1e6:.1f}", f"{total * 1e3:.2f}", *shares))
    return report.table([*head, *(f"share at {b} images per chip" for b in BATCHES)], lines)
