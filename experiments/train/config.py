"""Defines the options of a training run, and checks them before any work starts."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from experiments.errors import ConfigError


@dataclass(frozen=True)
class Training:
    """Options that change the numbers. A resumed run must repeat them."""

    data: Literal["mnist-5k", "fashion-mnist", "cifar-10"] = "mnist-5k"
    """mnist-5k: 4,000 + 1,000 real digits, embedded. fashion-mnist: the MNIST-format folder --data-dir. cifar-10: its
    binary files in --data-dir."""
    model: Literal["convnet", "resnet20"] = "convnet"
    """convnet: three blocks of convolution and norm. resnet20: of He et al. 2016, for 28×28 and 32×32 images."""
    epochs: int = 30
    """Passes over the training images."""
    batch_size: int = 64
    """Images per step, over all the devices together."""
    accumulate: int = 1
    """Micro-batches per batch, computed one after the other: less memory, and BN normalizes each by itself."""
    lr: float = 3e-3
    """Peak learning rate of AdamW."""
    warmup: float = 0.1
    """Fraction of the steps over which the learning rate rises; then half a cosine down to zero."""
    weight_decay: float = 0.05
    """Decoupled weight decay of the kernels. BN's scale and bias, and every other bias, are left out."""
    momentum: float = 0.9
    """Weight of the old value in BN's running averages."""
    width: int = 16
    """Channels of the first block or stage; the second has two times, the third four times as many."""
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    """Dtype of activations and gradients; parameters, statistics and sums are float32; float16 scales the loss."""
    skip_nonfinite: int = 20
    """How many steps in a row may be skipped because their gradient is NaN or Inf; one more is an error. A resumed run
    may have another limit."""
    max_shift: int = 2
    """Shift every training image at random by up to this many pixels each way; 0 for no shift."""
    flip: bool = False
    """Mirror every second training image, left to right; not for digits."""
    seed: int = 0
    """Seed of the parameters, the order of the data and the shifts."""


@dataclass(frozen=True)
class Hardware:
    """Options that say where a run executes. All of them may change at a resume: the numbers then agree to rounding."""

    partition: Literal["shard_map", "jit"] = "shard_map"
    """shard_map: the step names its devices. jit: XLA places the collectives. Both give the same numbers."""
    devices: int | None = None
    """Number of devices to use, simulated if the machine has only a CPU; by default all devices."""
    coordinator: str | None = None
    """host:port of the first process, when several processes train together."""
    processes: int = 1
    """How many processes train together; the batch is split over all their devices."""
    process_id: int = 0
    """The number of this process among them, from 0."""
    heartbeat_timeout: int = 60
    """Seconds without a heartbeat after which a process counts as lost, and the others end with an error."""


@dataclass(frozen=True)
class Files:
    """Options that say what is read and written."""

    data_dir: Path = Path("/usr/share/datasets/fashion-mnist")
    """Folder with the four MNIST-format IDX files, plain or .gz; or with CIFAR-10's six binary files."""
    runs: Path = Path("runs/train")
    """Folder of the numbered runs: each start makes the next number in it."""
    out: Path | None = None
    """Write to this folder instead of a numbered one."""
    resume: bool = False
    """Go on with the latest run in --runs (or with --out) exactly where it stopped; without one, start a new run."""
    stop_after: int | None = None
    """Stop with a checkpoint once this many steps are done, as SIGTERM does."""
    log_every: int = 10
    """Steps between two transfers of metrics from the devices to the host."""
    save_every: int | None = None
    """Steps between two checkpoints, besides the one after each epoch."""
    keep: int = 3
    """How many checkpoints to keep; older ones are deleted."""


@dataclass(frozen=True)
class Config:
    training: Training = field(default_factory=Training)
    hardware: Hardware = field(default_factory=Hardware)
    files: Files = field(default_factory=Files)
    smoke: bool = False
    """Run for seconds only: other defaults for --epochs and --width."""


def defaults(smoke: bool) -> Config:
    """Returns the default options, or those of --smoke; options on the command line override either."""
    full = Config()
    return replace(full, training=replace(full.training, epochs=1, width=8)) if smoke else full


def require(holds: bool, otherwise: str) -> None:
    """Raises ConfigError with the message `otherwise` unless `holds`."""
    if not holds:
        raise ConfigError(otherwise)


def validate(config: Config) -> None:
    """Raises ConfigError on the first option that cannot work on any machine."""
    training, hardware, files = config.training, config.hardware, config.files
    positive = {
        "epochs": training.epochs,
        "batch-size": training.batch_size,
        "accumulate": training.accumulate,
        "lr": training.lr,
        "width": training.width,
        "devices": hardware.devices,
        "processes": hardware.processes,
        "heartbeat-timeout": hardware.heartbeat_timeout,
        "stop-after": files.stop_after,
        "log-every": files.log_every,
        "save-every": files.save_every,
        "keep": files.keep,
    }
    for name, value in positive.items():
        require(value is None or 0 < value < float("inf"), f"--{name} {value}: expected a positive number")
    for name, value in {"warmup": training.warmup, "momentum": training.momentum}.items():
        require(0 <= value < 1, f"--{name} {value}: expected at least 0 and less than 1")
    require(0 <= training.weight_decay < float("inf"), f"--weight-decay {training.weight_decay}: expected 0 or more")
    require(0 <= training.max_shift < 28, f"--max-shift {training.max_shift}: expected 0 to 27")
    require(training.skip_nonfinite >= 0, f"--skip-nonfinite {training.skip_nonfinite}: expected 0 or more")
    require(0 <= training.seed < 2**31, f"--seed {training.seed}: expected at least 0 and less than 2^31")
    require(
        0 <= hardware.process_id < hardware.processes,
        f"--process-id {hardware.process_id}: expected 0 to {hardware.processes - 1}, one less than --processes",
    )
    require(
        (hardware.coordinator is None) == (hardware.processes == 1),
        "--coordinator and --processes (2 or more) go together",
    )


def check_split(batch_size: int, devices: int, accumulate: int, records: int) -> None:
    """Raises ConfigError unless the batch divides evenly over devices and micro-batches, and fits into the data."""
    over = f"{devices} devices" + (f" and {accumulate} micro-batches" if accumulate > 1 else "")
    parts = devices * accumulate
    require(
        batch_size % parts == 0,
        f"--batch-size {batch_size} does not divide over {over}: "
        f"expected a multiple, such as {-(-batch_size // parts) * parts}, or another --devices",
    )
    require(batch_size <= records, f"--batch-size {batch_size}: there are only {records} training images")
