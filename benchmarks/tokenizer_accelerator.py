"""How fast the tokenizer trains at full size in bfloat16, what that takes, and whether it says the same as FP32."""

from collections.abc import Callable
from functools import partial

import torch
from figures import Figure, at_least, at_most, stated, time_interleaved
from torch import Tensor, nn

from data.simulate import open_channel
from shodh.fields import FieldBatch, Grid
from tokenizer.autoencoder import Autoencoder, AutoencoderConfig
from tokenizer.layers import Convolution
from tokenizer.objective import ReconstructionConfig, reconstruction_loss

BATCH = 8  # of configs/train_tokenizer/base.yaml
FIELDS_A_SECOND = 100


def measure_accelerator(device: torch.device, num_cells: int, num_rounds: int) -> list[Figure]:
    """Fields of 5 channels a second, forward and backward, memory, layouts, compilation, and the canary of bfloat16."""
    model = wake(Autoencoder(AutoencoderConfig())).to(device)
    batch = draw_fields(num_cells, device)
    rehearsed = " (rehearsed on a CPU: means nothing)" if device.type == "cpu" else ""
    works = {
        "bf16": partial(run_forward_and_backward, model, batch, torch.bfloat16),
        "fp32": partial(run_forward_and_backward, model, batch, torch.float32),
    }
    works |= layouts(model, batch)
    times = time_interleaved({name: synchronised(work, device) for name, work in works.items()}, num_rounds)
    name = f"{num_cells}^3 x 5, batch {BATCH}{rehearsed}"
    return [
        at_least(f"{name}: forward + backward in bf16", BATCH / times["bf16"], FIELDS_A_SECOND, "fields/s"),
        stated(f"{name}: forward + backward in fp32", BATCH / times["fp32"], "fields/s"),
        stated(f"{name}: peak memory in bf16", measure_peak(works["bf16"], device) / 1e9, "GB"),
        at_most(f"{name}: bf16 over fp32 step", times["bf16"] / times["fp32"], 1.0),
        at_most(f"{name}: velocity in bf16 off fp32, relative", *compare_precisions(model, batch)),
        stated(f"{name}: channels_last_3d over contiguous", times["channels last"] / times["contiguous"]),
        *compare_compiled(name, model, batch, works["bf16"], num_rounds),
    ]


def compare_compiled(
    name: str, model: Autoencoder, batch: FieldBatch, eager: Callable[[], None], num_rounds: int
) -> list[Figure]:
    """The compiled step over the eager one; nothing, and a line that says so, where it does not compile."""
    device = batch.velocity.device
    compiled = torch.compile(model, backend="inductor" if device.type == "cuda" else "eager")
    works = {"eager": eager, "compiled": partial(run_forward_and_backward, compiled, batch, torch.bfloat16)}
    try:
        times = time_interleaved({kind: synchronised(work, device) for kind, work in works.items()}, num_rounds)
    except Exception as error:  # whatever a compiler raises, it must not cost the figures above
        print(f"torch.compile: {type(error).__name__}: {str(error).splitlines()[0]}. Not measured.")
        return []
    return [stated(f"{name}: torch.compile over eager", times["compiled"] / times["eager"])]


def draw_fields(num_cells: int, device: torch.device) -> FieldBatch:
    """White fields of a channel; what they hold changes no time."""
    n, domain = num_cells, open_channel.DOMAIN
    grid = Grid(shape=(n, n, n), spacing=(1 / n, 1 / n, 1 / n), boundary=domain.boundary)
    velocity, pressure, medium = (torch.randn(BATCH, channels, n, n, n, device=device) for channels in (3, 1, 1))
    return FieldBatch(velocity, pressure, medium, domain, grid)


@torch.no_grad()
def wake(model: Autoencoder) -> Autoencoder:
    """The same model with weights where residual branches begin at zero, so that precision has all layers to act on."""
    for module in model.modules():
        if isinstance(module, Convolution) and not module.weight.any():
            bound = module.weight.shape[1] ** -0.5
            module.weight.uniform_(-bound, bound)
    return model


def run_forward_and_backward(model: Callable, batch: FieldBatch, dtype: torch.dtype) -> None:
    """The objective and its gradients, as in a training step."""
    with torch.autocast(batch.velocity.device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        loss = reconstruction_loss(model(batch), batch, ReconstructionConfig())["total"]
    loss.backward()


def layouts(model: Autoencoder, batch: FieldBatch) -> dict[str, Callable[[], None]]:
    """The encoder's convolutions in both memory layouts, in bfloat16."""
    fields = torch.cat([batch.velocity, batch.pressure, batch.medium], 1)

    def encode(values: Tensor) -> None:
        with torch.autocast(values.device.type, dtype=torch.bfloat16):
            model.encoder(values, batch.domain.boundary).float().square().sum().backward()

    last = fields.contiguous(memory_format=torch.channels_last_3d)
    return {"contiguous": partial(encode, fields.contiguous()), "channels last": partial(encode, last)}


def synchronised(work: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """The work to its end: kernels run after the call that asked for them."""

    def run() -> None:
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return run


def measure_peak(work: Callable[[], None], device: torch.device) -> float:
    """Bytes at most allocated during the work, weights and gradients included; 0 where that is not known."""
    if device.type != "cuda":
        return 0.0
    torch.cuda.reset_peak_memory_stats(device)
    work()
    return float(torch.cuda.max_memory_allocated(device))


@torch.no_grad()
def compare_precisions(model: nn.Module, batch: FieldBatch) -> tuple[float, float]:
    """Relative rms difference of velocity in bfloat16 from FP32, and what rounding in every layer may make of it.

    Each of L convolutions in a row rounds by up to eps of bfloat16 at random: sqrt(L) eps.
    """
    exact = model(batch).velocity
    with torch.autocast(batch.velocity.device.type, dtype=torch.bfloat16):
        low = model(batch).velocity.float()
    num_layers = sum(isinstance(module, Convolution) for module in model.modules())
    error = float((low - exact).square().mean().sqrt() / exact.square().mean().sqrt())
    return error, num_layers**0.5 * torch.finfo(torch.bfloat16).eps
