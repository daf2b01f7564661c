"""How much memory a training will take, computed before it starts: what each part takes, and whether it fits.

Sizes are in bytes, for one process, of whole training steps; about right (the allocator, the CUDA context and the
largest temporary are not counted), and for texts as long as they may be. docs/PERFORMANCE.md says how to use it.
"""

from __future__ import annotations

from dataclasses import dataclass

from beit3.model.encoder import TEXT_POSITIONS, EncoderConfig
from beit3.model.recompute import recomputes
from beit3.training.backends import BUCKET, BackendSettings

GIGABYTE = 1e9
TIGHT = 0.9  # share of the memory there is, beyond which what is not counted may not fit


@dataclass(frozen=True)
class Demand:
    """Bytes of one process: those that do not depend on the batch, and those of each picture (with its texts)."""

    weights: float
    gradients: float
    optimizer: float
    average: float
    per_picture: float
    pictures: int

    @property
    def fixed(self) -> float:
        return self.weights + self.gradients + self.optimizer + self.average

    @property
    def total(self) -> float:
        return self.fixed + self.pictures * self.per_picture

    def most_pictures(self, room: float) -> int:
        """The largest batch that `room` bytes hold."""
        return max(0, int((TIGHT * room - self.fixed) / self.per_picture))

    def fits(self, room: float) -> bool:
        return self.total <= TIGHT * room

    def advice(self, room: float, *, update_freq: int, zero_stage: int, recomputes: bool) -> str | None:
        """What to do where `room` bytes may be too few; None where they are enough.

        A smaller batch keeps the pairs per step, because these belong to the recipe.

        Args:
            update_freq: batches per step. zero_stage: 0 without DeepSpeed. recomputes: whether layers are recomputed.
        """
        if self.fits(room):
            return None
        pairs, most = self.pictures * update_freq, self.most_pictures(room)
        smaller = max((batch for batch in range(1, most + 1) if pairs % batch == 0), default=0)
        ways = [f"--batch_size {smaller} --update_freq {pairs // smaller}"] if smaller else []
        ways += [] if recomputes else ["--checkpoint_activations"]
        ways += [] if zero_stage >= 2 else ["--enable_deepspeed --zero_stage 2"]
        return f"that may not fit: {', or '.join(ways) or 'take a smaller model, or a device with more memory'}"

    def __str__(self) -> str:
        parts = {"weights": self.weights, "gradients": self.gradients, "optimizer": self.optimizer}
        if self.average:
            parts["average"] = self.average
        listed = ", ".join(f"{name} {size / GIGABYTE:.2f}" for name, size in parts.items())
        return (
            f"{self.total / GIGABYTE:.1f} GB: {listed}, activations {self.pictures} × {self.per_picture / GIGABYTE:.3f}"
        )


def training_demand(
    config: EncoderConfig,
    num_parameters: int,
    settings: BackendSettings,
    *,
    device: str,
    text_tokens: int,
    output_values: int,
    causal_text: bool = False,
    zero: bool = False,
    world_size: int = 1,
    average: bool = False,
    trained: int | None = None,
    layers_below: int = 0,
) -> Demand:
    """What a training step takes.

    Args:
        num_parameters: of the whole model.
        device: "cuda" or "cpu".
        text_tokens: of all texts of a picture, at most. output_values: of the model's output, for a picture.
        causal_text: as the encoder is called.
        zero: DeepSpeed, at `settings.zero_stage`. average: whether an average of the weights is kept on the device.
        trained: of the parameters, those that are not frozen; None: all. layers_below: the layers below the lowest of
            these, which keep nothing for a backward pass. What frozen parameters above it save is not counted: little,
            but where pictures do not see texts (`causal_text`) and are frozen, two thirds of the activations.
    """
    size = 4 if settings.precision == "fp32" else 2
    trained = num_parameters if trained is None else trained
    layers = config.layers - layers_below
    weights, gradients, optimizer = (_of_deepspeed if zero else _of_pytorch)(
        config, num_parameters, settings, world_size, trained, layers
    )
    return Demand(
        weights,
        gradients,
        optimizer,
        4.0 * trained if average else 0.0,
        _activations(config, layers, size, device, text_tokens, size == 2 and not zero, causal_text)
        # Captioning's loss keeps log-probabilities in fp32. Their gradient takes twice as much, while all the rest is
        # still kept. VQAv2 has so few answers that its loss does not matter.
        + 3 * 4 * output_values,
        settings.batch_size,
    )


def _of_pytorch(
    config: EncoderConfig, parameters: int, settings: BackendSettings, world_size: int, trained: int, layers: int
) -> tuple[float, float, float]:
    """Weights, gradients, optimizer: fp32; AdamW has two more values for each that is trained.

    layers: those with a backward pass.
    """
    # Autocast keeps what it made of the weights until the backward pass is over; tables are read as they are.
    copies = 4 * _joint_projections(config, layers)
    if settings.precision != "fp32":
        tables = (config.vocab_size + TEXT_POSITIONS + config.patches) * config.width
        below = (config.layers - layers) * 2 * 12 * config.width**2  # of two experts: attention 4, the rest 8
        copies = 2 * (parameters - tables - below)
    buckets = 4 * trained if world_size > 1 else 0  # of DistributedDataParallel
    return 4.0 * parameters + copies, 4.0 * trained + buckets, 8.0 * trained


def _of_deepspeed(
    config: EncoderConfig, parameters: int, settings: BackendSettings, world_size: int, trained: int, layers: int
) -> tuple[float, float, float]:
    """The same in DeepSpeed 0.19: half-precision weights have fp32 ones beside them, ZeRO shares among processes."""
    stage, size = settings.zero_stage, 4 if settings.precision == "fp32" else 2
    share = trained / world_size
    weights = size * (parameters / world_size if stage == 3 else parameters) + size * _joint_projections(config, layers)
    gradients = float(size * (share if stage >= 2 else trained))
    if stage >= 1:
        # Those of the own part as the optimizer wants them, and what is under way.
        gradients += 4 * share + size * min(BUCKET, trained)
    if stage <= 1 and size == 2:
        gradients += 4 * trained  # summed in fp32
    states = 8 if stage == 0 and size == 4 else 12  # fp32 weights of the own part, and AdamW's two values
    return float(weights), gradients, states * (trained if stage == 0 else share)


def _joint_projections(config: EncoderConfig, layers: int) -> int:
    """Values of the matrices that each forward pass makes of q, k and v of these layers, and keeps."""
    return 2 * layers * 3 * config.width**2


def _activations(
    config: EncoderConfig, layers: int, size: int, device: str, text_tokens: int, autocast: bool, causal_text: bool
) -> float:
    """What the encoder's upper `layers` keep of a picture and its texts for the backward pass."""
    if layers == 0:
        return 0.0
    tokens = config.patches + 1 + text_tokens
    # On a GPU autocast computes norms in fp32, and keeps a copy of what goes into them.
    norm_input = 4 if autocast and device == "cuda" else size
    # In widths: both residuals; q, k and v, attended, and four each of fc1 and GELU, which goes into a norm.
    per_token = 2 * norm_input + 8 * size + 4 * norm_input
    if not recomputes(device, config.width):
        per_token += 7 * size + (norm_input if norm_input != size else 0)  # what four norms give; attended, into one
        per_token += 2 * size if causal_text else 0  # keys and values of both modalities for the text
    whole = config.width * tokens * per_token
    if config.recompute_activations:
        return layers * config.width * tokens * size + whole
    # The last layer computes a few positions only: its input, norm, keys and values are all there is.
    return (layers - 1) * whole + 4 * size * config.width * tokens
