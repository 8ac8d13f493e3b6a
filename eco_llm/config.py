"""Every setting and its default, as frozen dataclasses. The only place a default lives.

Torch-free on purpose: `--help`, `--print-config` and every refusal of bad input come from here and must be
instant. Field names are flag names (`d_model` is `--d-model`); field docstrings are the flags' help. `validate`
methods raise `UserError` with one line that names the flag.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal, get_args, get_origin, get_type_hints

from eco_llm.errors import UserError

VALIDATION_TOKENS = 8192
"""Of one forward pass of validation, at most, if a sequence has no more. It runs beside the memory that a CUDA graph
keeps for its replays, so a whole batch at once would set aside a GiB and more that training cannot use."""


def validation_rows(batch: int, seq_len: int) -> int:
    """Sequences of a batch, of one at least, that validation scores at once: as even as the fewest parts can be, for
    every shape costs compiled blocks a compilation.
    """
    most = max(1, VALIDATION_TOKENS // seq_len)
    parts = -(-batch // most)
    return -(-batch // parts)


def flag_of(name: str) -> str:
    """A field's name as the flag that is typed."""
    return "--" + name.replace("_", "-")


def _check_range(config: object, **limits: tuple[float, float]) -> None:
    """Every named field lies in its closed range; NaN never does."""
    for name, (low, high) in limits.items():
        value = getattr(config, name)
        if not (low <= value <= high):  # also refuses NaN
            raise UserError(f"{flag_of(name)} must be between {_number(low)} and {_number(high)}, got {_number(value)}")


def _number(value: float) -> str:
    """Whole numbers in full (what `:g` rounds away may be the reason of a refusal), up to a readable length."""
    if isinstance(value, float):
        return f"{value:g}"
    return str(value) if abs(value) < 10**24 else "a number of more than 24 digits"


def _check_text(config: object, *names: str) -> None:
    """Every named field is text that UTF-8 can hold; bytes of another encoding reach Python as lone surrogates."""
    for name in names:
        try:
            getattr(config, name).encode()
        except UnicodeEncodeError:
            raise UserError(f"{flag_of(name)} {getattr(config, name)!a} is not valid UTF-8 text") from None


@dataclass(frozen=True)
class SigmaConfig:
    """Model: the shape of a SigmaLLM."""

    d_model: int = 768
    """Model width D."""
    n_layers: int = 18
    """Number of blocks; each is a mixer and an MLP."""
    n_heads: int = 12
    """Heads of an MLA mixer; D must divide by it, and D / heads is the head width (at most 128)."""
    mamba_ratio: int = 5
    """Mamba blocks in each group of the mixer pattern."""
    attention_ratio: int = 1
    """MLA blocks that close each group of the mixer pattern (0: pure Mamba)."""
    mamba_expand: int = 2
    """Mamba inner width as a multiple of D."""
    mamba_head_dim: int = 64
    """SSM head width P in channels; the inner width must divide by it."""
    mamba_state_dim: int = 128
    """SSM state size N per head."""
    mamba_conv_width: int = 4
    """Taps of the causal depthwise convolution."""
    mamba_chunk: Literal["auto", 64, 128, 256] = "auto"
    """SSD chunk length; auto follows the measured tile policy, a number pins it."""
    kv_latent_dim: int = 256
    """Width of the MLA latent from which keys and values are expanded."""
    q_latent_dim: int = 0
    """Width of the MLA query latent; 0 projects queries directly from D."""
    rope_head_dim: int = 32
    """Part of each MLA head that carries rotary position; even and smaller than the head width."""
    rope_theta: float = 10_000.0
    """Base of the rotary frequencies."""
    mlp_hidden_dim: int = 0
    """SwiGLU hidden width; 0 means 8/3 of D, rounded up to a multiple of 64."""
    vocab_size: int = 32_768
    """Vocabulary V: rows of the embedding, and the size of a tokenizer trained here."""
    tie_embeddings: bool = True
    """Share one matrix between the embedding and the output head."""
    norm_eps: float = 1e-5
    """Epsilon of every RMSNorm."""
    loss_chunk_tokens: int = 2048
    """Tokens whose logits exist at one time in the chunked loss; memory is this times V."""

    @property
    def head_dim(self) -> int:
        """MLA head width, channels (the same for queries, keys and values)."""
        return self.d_model // self.n_heads

    @property
    def mamba_inner_dim(self) -> int:
        """H·P = expand·D, channels."""
        return self.mamba_expand * self.d_model

    @property
    def mamba_n_heads(self) -> int:
        """SSM heads H."""
        return self.mamba_inner_dim // self.mamba_head_dim

    @property
    def mlp_dim(self) -> int:
        """SwiGLU hidden width, channels."""
        return self.mlp_hidden_dim or -(-8 * self.d_model // (3 * 64)) * 64

    @property
    def mixer_pattern(self) -> tuple[Literal["mamba", "mla"], ...]:
        """The mixer of every block, first to last: `mamba_ratio` Mambas, then `attention_ratio` MLAs, repeated."""
        group = self.mamba_ratio + self.attention_ratio
        return tuple("mamba" if i % group < self.mamba_ratio else "mla" for i in range(self.n_layers))

    def validate(self) -> None:
        """Raise UserError for a shape that cannot be built."""
        _check_range(
            self,
            d_model=(8, 65_536),
            n_layers=(1, 1024),
            n_heads=(1, 1024),
            mamba_ratio=(0, 1024),
            attention_ratio=(0, 1024),
            mamba_expand=(1, 16),
            mamba_head_dim=(1, 1024),
            mamba_state_dim=(1, 1024),
            mamba_conv_width=(2, 16),
            kv_latent_dim=(1, 65_536),
            q_latent_dim=(0, 65_536),
            rope_head_dim=(2, 128),
            rope_theta=(1.0, 1e12),
            mlp_hidden_dim=(0, 1_048_576),
            vocab_size=(257, 4_194_304),
            norm_eps=(1e-12, 1e-1),
            loss_chunk_tokens=(1, 1_048_576),
        )
        if self.mamba_ratio + self.attention_ratio == 0:
            raise UserError("--mamba-ratio and --attention-ratio are both 0: there would be no mixer")
        if "mla" in self.mixer_pattern:
            if self.d_model % self.n_heads:
                raise UserError(f"--d-model {self.d_model} is not divisible by --n-heads {self.n_heads}")
            if self.head_dim > 128:
                raise UserError(
                    f"--d-model {self.d_model} / --n-heads {self.n_heads} gives heads of width {self.head_dim};"
                    " the limit is 128"
                )
            if self.rope_head_dim % 2 or self.rope_head_dim >= self.head_dim:
                raise UserError(
                    f"--rope-head-dim {self.rope_head_dim} must be even and smaller than the head width"
                    f" {self.head_dim} (--d-model / --n-heads)"
                )
        if "mamba" in self.mixer_pattern and self.mamba_inner_dim % self.mamba_head_dim:
            raise UserError(
                f"--mamba-expand {self.mamba_expand} × --d-model {self.d_model} is not divisible by"
                f" --mamba-head-dim {self.mamba_head_dim}"
            )


@dataclass(frozen=True)
class DataConfig:
    """Data: what text is read and how it becomes tokens."""

    data: tuple[str, ...] = ("stdlib",)
    """Corpus: `stdlib` (this Python's standard library), `python-env` (all installed packages' sources),
    `hf:NAME`, or files, directories and globs (.txt .md .py .jsonl[.gz|.zst] .parquet)."""
    text_field: str = "text"
    """Field of .jsonl and .parquet records, and of `hf:` data sets, that holds the text."""
    tokenizer: str = "train"
    """`train` trains a byte-level BPE of --vocab-size on the corpus; otherwise a tokenizer.json file."""
    val_fraction: float = 0.01
    """Share of documents held out for validation, chosen by document hash."""
    data_cache: str = ".data_cache"
    """Folder of prepared data sets, keyed by content."""

    def validate(self) -> None:
        """Raise UserError for settings no corpus can satisfy; files are checked by `data.sources`."""
        if not self.data or any(not d.strip() for d in self.data):
            raise UserError("--data needs at least one corpus: stdlib, python-env, hf:NAME or a path")
        if not self.text_field:
            raise UserError("--text-field is empty")
        _check_range(self, val_fraction=(0.0001, 0.5))


@dataclass(frozen=True)
class OptimizerConfig:
    """Optimizer: rule and learning-rate schedule."""

    optimizer: Literal["c3o", "adamw", "muon"] = "c3o"
    """Update rule; adamw and muon are PyTorch's, for comparison."""
    lr: float = 1e-3
    """Peak learning rate."""
    weight_decay: float = 0.1
    """Decoupled weight decay on matrices (never on norms, biases or SSM scalars)."""
    beta1: float = 0.9
    """Decay of the first moment."""
    beta2: float = 0.95
    """Decay of the second moment."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    grad_clip: float = 1.0
    """Gradient clip threshold; 0 is off."""
    grad_clip_mode: Literal["norm", "value"] = "norm"
    """Clip the global norm, or clamp each element (the report's)."""
    gradient_release: bool = False
    """Update each block inside backward and free its gradients at once; needs --grad-accum 1 and no norm clipping."""
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    """After warm-up: cosine to the end; or stable, then a linear decay (WSD); or constant."""
    warmup_steps: int = 100
    """Steps of linear warm-up (capped at a tenth of --steps)."""
    decay_fraction: float = 0.2
    """Share of --steps that WSD spends decaying."""
    min_lr_ratio: float = 0.1
    """Final learning rate as a share of --lr."""

    def validate(self) -> None:
        """Raise UserError for values outside what the update rules allow."""
        _check_range(
            self,
            lr=(0.0, 100.0),
            weight_decay=(0.0, 100.0),
            beta1=(0.0, 0.9999),
            beta2=(0.0, 0.99999),
            eps=(1e-30, 1.0),
            grad_clip=(0.0, 1e9),
            warmup_steps=(0, 10_000_000),
            decay_fraction=(0.0, 1.0),
            min_lr_ratio=(0.0, 1.0),
        )
        if self.gradient_release and self.grad_clip > 0 and self.grad_clip_mode == "norm":
            raise UserError(
                f"--gradient-release cannot clip by the norm of all gradients (--grad-clip {self.grad_clip:g}),"
                " known only when the first are gone; use --grad-clip-mode value or --grad-clip 0"
            )


@dataclass(frozen=True)
class C3OConfig:
    """C3O: settings of the report's optimizer."""

    c3o_trust_radius: float = 0.1
    """Cap on an update's norm as a share of its tensor's norm; 0 is off."""
    c3o_sphere: float = 0.0
    """Keeps each hidden matrix's norm; a step moves it by this times --lr, as a share of the norm. 0 is off."""
    c3o_trust_norm_refresh_drift: float = 0.0
    """Margin under which a tensor's exact update norm may be skipped (0.0: always exact)."""
    c3o_trust_norm_refresh_steps: int = 16
    """Most steps a cached parameter norm may be used for."""
    c3o_credit_gain: float = 0.0
    """Strength of the block credit that scales updates; 0 is off."""
    c3o_nesterov: bool = True
    """Direction that looks one step ahead (NAdam's)."""
    c3o_state_dtype: Literal["fp32", "bf16", "int8", "int4"] = "fp32"
    """Storage of the two moments: 8, 4, 2.06 or 1.06 bytes per parameter together."""
    c3o_error_bits: Literal[0, 8] = 0
    """8: one more byte per bf16 weight, so that it holds 16 significant bits; 0 is off."""

    def validate(self) -> None:
        """Raise UserError for values outside the rule's definition."""
        _check_range(
            self,
            c3o_trust_radius=(0.0, 1e6),
            c3o_sphere=(0.0, 1e6),
            c3o_trust_norm_refresh_drift=(0.0, 0.99),
            c3o_trust_norm_refresh_steps=(1, 1_000_000),
            c3o_credit_gain=(0.0, 100.0),
        )


@dataclass(frozen=True)
class TrainingConfig:
    """Training: batch, length, run directory, checkpoints."""

    output_dir: str = "runs/sigma_main"
    """Run directory; a run found there is resumed."""
    resume: bool = True
    """Continue from the newest checkpoint; --no-resume sets an earlier run aside and starts anew."""
    steps: int = 1000
    """Optimizer steps in the whole run."""
    batch_size: int = 4
    """Sequences B in one forward pass."""
    seq_len: int = 512
    """Tokens T in one sequence."""
    grad_accum: int = 1
    """Forward and backward passes in one optimizer step."""
    seed: int = 0
    """Seed of initialisation, shuffling and sampling."""
    save_interval: int = 500
    """Steps between checkpoints; the last step is always saved."""
    keep_checkpoints: int = 2
    """Newest checkpoints kept."""
    log_interval: int = 10
    """Steps between progress lines."""
    eval_interval: int = 250
    """Steps between validations; the last step is always validated. 0 is never."""
    eval_batches: int = 16
    """Batches in one validation."""
    max_bad_steps: int = 5
    """Steps in a row with a NaN or infinite loss or gradient before training stops."""
    sample_tokens: int = 128
    """Tokens of the sample printed at the end; 0 prints none."""
    sample_prompt: str = "def main():"
    """Start of that sample."""

    @property
    def tokens_per_step(self) -> int:
        """Tokens in one optimizer step, all micro-batches."""
        return self.batch_size * self.seq_len * self.grad_accum

    def validate(self) -> None:
        """Raise UserError for impossible counts."""
        big = 1_000_000_000
        _check_range(
            self,
            steps=(1, big),
            batch_size=(1, 65_536),
            seq_len=(1, 1_048_576),
            grad_accum=(1, 65_536),
            seed=(0, 2**63 - 1),
            save_interval=(1, big),
            keep_checkpoints=(1, 10_000),
            log_interval=(1, big),
            eval_interval=(0, big),
            eval_batches=(1, 1_000_000),
            max_bad_steps=(1, big),
            sample_tokens=(0, 65_536),
        )
        if not self.output_dir.strip():
            raise UserError("--output-dir is empty")
        _check_text(self, "sample_prompt")


@dataclass(frozen=True)
class RuntimeConfig:
    """Runtime: device, compilation and launching."""

    device: str = "auto"
    """`auto`, `cpu`, `cuda` or `cuda:N`."""
    dtype: Literal["auto", "fp32", "bf16"] = "auto"
    """Compute type of matrix products; auto is bf16 on CUDA and fp32 on CPU."""
    weights_dtype: Literal["fp32", "bf16"] = "fp32"
    """Storage of the model's matrices and of their gradients; norms, biases and SSM scalars stay fp32."""
    torch_compile: Literal["auto", "on", "off"] = "auto"
    """Compile each block (`--torch-compile`, `--no-torch-compile`); auto is what measured
    faster, off on a GPU that Triton does not serve, and off where our kernels make a step that is one CUDA graph."""
    cuda_graph: Literal["auto", "on", "off"] = "auto"
    """Replay the whole training step as one CUDA graph; auto does so wherever it can."""

    def validate(self) -> None:
        """Raise UserError for a device name that is none."""
        kind, colon, index = self.device.partition(":")
        if kind not in ("auto", "cpu", "cuda") or (colon and (kind != "cuda" or not index.isdecimal())):
            raise UserError(f"--device {self.device!r} is not one of auto, cpu, cuda, cuda:N")


COUPLED_FORM = "blocks"
"""What a step of the coupled network is, saved with runs: a whole block. In runs that do not say it was half of one."""

MEMORY_MODES = ("none", "recompute", "compress", "fixed-point", "coupled")
"""What a block keeps for backward; docs/instant.md."""


@dataclass(frozen=True)
class InstantConfig:
    """INSTANT: what is kept for backward, and how it is checked."""

    instant_mode: str = "none"
    """Memory mode: none, recompute, compress, fixed-point, coupled (whole stack only), or one for each block, first to
    last, as in `recompute*12,none*6`; auto is the fastest exact one that fits into --vram-gib."""
    instant_reversible_tol: float = 3e-3
    """fixed-point: largest relative residual of an inversion that the gate lets pass."""
    instant_max_iters: int = 12
    """fixed-point: most iterations of one inversion; a block that needs more is recomputed."""
    instant_bits: Literal["auto", "8", "4"] = "auto"
    """compress: bits of a stored number; auto is 8, and 4 for blocks whose probe allows it."""
    instant_int4_probe_interval: int = 200
    """Steps between probes: of 4 bits (compress) and of the iterations each block needs (fixed-point)."""
    instant_error_threshold: float = 0.1
    """compress: largest relative error of what is stored with which 4 bits are used."""
    vram_gib: float = 0.0
    """GPU memory that training may take, for `--instant-mode auto` and `eco_train plan`; 0 is not given."""

    @property
    def coupled(self) -> bool:
        """Whether the network is of the coupled form: another function of the same weights, at inference too."""
        return self.instant_mode == "coupled"

    def block_modes(self, mixers: tuple[str, ...]) -> tuple[str, ...]:
        """The mode of every block. Blocks without a Mamba mixer are not inverted but recomputed.

        Raises:
            UserError: an unknown mode, or one for more or fewer blocks than there are.
        """
        parts = [part.strip() for part in self.instant_mode.split(",")]
        modes: list[str] = []
        for part in parts:
            name, star, count = part.partition("*")
            if name not in MEMORY_MODES:
                raise UserError(
                    f"--instant-mode {self.instant_mode!r}: {name!r} is not one of {', '.join(MEMORY_MODES)}, auto"
                )
            if not star and len(parts) == 1:
                modes = [name] * len(mixers)
            elif star and (not count.isdecimal() or not 1 <= int(count) <= len(mixers)):
                raise UserError(
                    f"--instant-mode {self.instant_mode!r}: {part!r} names no number of the {len(mixers)} blocks"
                )
            else:
                modes += [name] * (int(count) if star else 1)
        if len(modes) != len(mixers):
            raise UserError(f"--instant-mode {self.instant_mode!r} is for {len(modes)} blocks, not for {len(mixers)}")
        if "coupled" in modes and not self.coupled:
            raise UserError("--instant-mode coupled is a form of the whole stack; it cannot be had for some blocks")
        return tuple(
            "recompute" if mode == "fixed-point" and mixer != "mamba" else mode
            for mode, mixer in zip(modes, mixers, strict=True)
        )

    def validate(self) -> None:
        """Raise UserError for values outside their range; `block_modes` judges the mode."""
        _check_range(
            self,
            instant_reversible_tol=(1e-7, 1.0),
            instant_max_iters=(1, 100),
            instant_int4_probe_interval=(1, 1_000_000),
            instant_error_threshold=(1e-6, 1.0),
            vram_gib=(0.0, 100_000.0),
        )


@dataclass(frozen=True)
class PerfConfig:
    """Perf: a measured window of steps and its profile."""

    perf_profile_enable: bool = False
    """Measure a window and write perf/baseline_throughput.json."""
    perf_warmup_steps: int = 10
    """Steps left out before the window."""
    perf_measure_steps: int = 20
    """Steps in the window."""
    perf_profiler_steps: int = 0
    """Steps traced by torch.profiler after the window; 0 is none."""
    perf_device_time_mode: Literal["auto", "events", "host"] = "auto"
    """Phase clock: CUDA events, the host's, or events where there is a GPU."""
    perf_sync_boundaries: bool = False
    """Synchronise the device at every phase boundary: exact host times, slower steps."""
    memory_report: Literal["off", "once", "step"] = "off"
    """Where a step's GPU memory goes, once or every step, and a snapshot for PyTorch's memory viewer."""

    def validate(self) -> None:
        """Raise UserError for impossible counts."""
        big = 1_000_000
        _check_range(
            self,
            perf_warmup_steps=(0, big),
            perf_measure_steps=(1, big),
            perf_profiler_steps=(0, 10_000),
        )
        if self.perf_profiler_steps and not self.perf_profile_enable:
            raise UserError(
                f"--perf-profiler-steps {self.perf_profiler_steps} traces steps after the measured window:"
                " add --perf-profile-enable, or leave it out"
            )


@dataclass(frozen=True)
class TrainConfig:
    """Everything `eco_train train` can be told."""

    training: TrainingConfig = field(default_factory=TrainingConfig)
    model: SigmaConfig = field(default_factory=SigmaConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    c3o: C3OConfig = field(default_factory=C3OConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    instant: InstantConfig = field(default_factory=InstantConfig)
    perf: PerfConfig = field(default_factory=PerfConfig)

    def validate(self) -> None:
        """Raise UserError for the first setting, or pair of settings, that cannot work."""
        for group in dataclasses.fields(self):
            getattr(self, group.name).validate()
        if self.instant.instant_mode != "auto":
            self.instant.block_modes(self.model.mixer_pattern)
        elif not self.instant.vram_gib:
            raise UserError("--instant-mode auto needs --vram-gib, the GPU's memory that training may take")
        t, p = self.training, self.perf
        tokens = t.batch_size * t.seq_len
        if tokens > 2**31:
            raise UserError(f"--batch-size × --seq-len is {tokens} tokens; the limit is {2**31}")
        if self.optimizer.gradient_release and t.grad_accum > 1:
            raise UserError(
                f"--gradient-release keeps no gradients that --grad-accum {t.grad_accum} could add to;"
                " use --grad-accum 1 and a larger --batch-size"
            )
        if self.optimizer.optimizer == "c3o" and self.c3o.c3o_sphere * self.optimizer.lr >= 1:
            raise UserError(
                f"--c3o-sphere {self.c3o.c3o_sphere:g} × --lr {self.optimizer.lr:g} is the share of its norm by which a"
                " matrix moves in a step; it must be under 1"
            )
        if p.perf_profile_enable and p.perf_warmup_steps + p.perf_measure_steps > t.steps:
            raise UserError(
                f"--perf-warmup-steps {p.perf_warmup_steps} + --perf-measure-steps {p.perf_measure_steps}"
                f" exceed --steps {t.steps}"
            )
        if self.runtime.cuda_graph == "on" and (reason := self.excludes_cuda_graph()):
            raise UserError(f"--cuda-graph on cannot be had with {reason}; use auto or off")

    def excludes_cuda_graph(self) -> str | None:
        """The setting, if any, with which a step cannot be one CUDA graph, for people to read."""
        if self.runtime.device == "cpu":
            return "--device cpu"
        if self.optimizer.optimizer == "muon":
            return "--optimizer muon, which is not captured"
        if self.optimizer.optimizer == "c3o" and self.c3o.c3o_credit_gain > 0:
            return "--c3o-credit-gain, which C3O's kernels do not compute"
        if self.perf.perf_sync_boundaries:
            return "--perf-sync-boundaries, which stop the device inside the step"
        if self.perf.perf_device_time_mode == "host":
            return "--perf-device-time-mode host, whose clock does not see into a graph"
        return None


# Settings that may change when a run is resumed: none of them changes what is learned from the same steps,
# except `steps`, which moves the end of the schedule and is announced, and `data`, which may be spelt differently:
# whether it still names the same tokens is checked by their fingerprint.
FREE_ON_RESUME = frozenset(
    {
        "output_dir", "resume", "steps", "save_interval", "keep_checkpoints", "log_interval", "eval_interval",
        "eval_batches", "max_bad_steps", "sample_tokens", "sample_prompt", "data", "data_cache", "device",
        "torch_compile", "cuda_graph",
        "gradient_release",  # the same numbers, in another order
        "c3o_trust_norm_refresh_drift",  # a norm is skipped only where a bound proves that the cap is idle
        *(f.name for f in dataclasses.fields(PerfConfig)),
        *(f.name for f in dataclasses.fields(InstantConfig)),  # but for the coupled form: see `differences`
    }
)  # fmt: skip

# Settings, and sections, that runs of earlier versions do not have; they take their defaults, or what is said below.
ADDED_SINCE_0_1_0 = frozenset(
    {
        "cuda_graph",
        "instant",
        "weights_dtype",
        "gradient_release",
        "memory_report",
        "vram_gib",
        "c3o_sphere",
        "c3o_nesterov",
    }
)

BEFORE_THEM: dict[str, Any] = {"c3o_nesterov": False}
"""Settings added since whose default is not what earlier versions did; and what these did."""

# Settings that earlier versions had, and the value that a run may have had of them to be continued.
_GONE: dict[str, Any] = {"c3o_cautious": False}


def flatten(config: TrainConfig) -> dict[str, Any]:
    """One flat {field name: value} dictionary; names are unique across groups."""
    flat: dict[str, Any] = {}
    for group in dataclasses.fields(config):
        flat.update(dataclasses.asdict(getattr(config, group.name)))
    return flat


def to_dict(config: TrainConfig) -> dict[str, dict[str, Any]]:
    """Nested plain dictionary, ready for JSON."""
    return dataclasses.asdict(config)


def from_dict(raw: dict[str, Any], *, source: str) -> TrainConfig:
    """Rebuild a TrainConfig that `to_dict` made.

    Raises:
        UserError: `source` (the file's name, for the message) has a missing, unknown or mistyped entry.
    """
    groups: dict[str, Any] = {}
    for name, cls in get_type_hints(TrainConfig).items():
        if name not in raw and name in ADDED_SINCE_0_1_0:
            groups[name] = cls()
            continue
        values = raw.get(name)
        if not isinstance(values, dict):
            raise UserError(f"{source}: no section {name!r}")
        hints = get_type_hints(cls)
        for gone in set(values) & set(_GONE):
            if values[gone] != _GONE[gone]:
                raise UserError(f"{source}: {gone!r} is {values[gone]!r}, a setting that this version no longer has")
        values = {k: v for k, v in values.items() if k not in _GONE}
        if unknown := sorted(set(values) - set(hints)):
            raise UserError(f"{source}: unknown setting {unknown[0]!r} in {name!r}")
        if missing := sorted(set(hints) - set(values) - ADDED_SINCE_0_1_0):
            raise UserError(f"{source}: no setting {missing[0]!r} in {name!r}")
        values = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        if mistyped := [k for k, v in values.items() if not _fits(v, hints[k])]:
            raise UserError(f"{source}: {mistyped[0]!r} in {name!r} cannot be {values[mistyped[0]]!r}")
        groups[name] = cls(**{k: v for k, v in BEFORE_THEM.items() if k in hints} | values)
    return TrainConfig(**groups)


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value read from JSON is of a field's annotated type (those that settings use)."""
    if get_origin(hint) is Literal:
        return value in get_args(hint) and not isinstance(value, bool)
    if get_origin(hint) is tuple:
        return isinstance(value, tuple) and all(isinstance(v, str) for v in value)
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    return type(value) is hint


def differences(old: TrainConfig, new: TrainConfig) -> dict[str, tuple[Any, Any]]:
    """Settings, other than those free on resume, in which two configurations differ: {name: (old, new)}."""
    a, b = flatten(old), flatten(new)
    found = {k: (a[k], b[k]) for k in b if k not in FREE_ON_RESUME and a[k] != b[k]}
    if old.instant.coupled != new.instant.coupled:
        found["instant_mode"] = (old.instant.instant_mode, new.instant.instant_mode)
    return found


@dataclass(frozen=True)
class SampleConfig:
    """Everything `eco_train sample` can be told."""

    run: str = "runs/sigma_main"
    """Run directory of the trained model."""
    prompt: str = "def main():"
    """Text to continue; a space at its end would be a token of its own, which text rarely has there."""
    tokens: int = 200
    """Most tokens to add; an end-of-text token ends sooner."""
    temperature: float = 0.8
    """Randomness: 0 always takes the likeliest token."""
    top_k: int = 0
    """Choose among this many likeliest tokens; 0 is all."""
    top_p: float = 0.95
    """Choose among the likeliest tokens that together reach this probability; 1 is all."""
    seed: int = 0
    """Seed of the choice."""
    step: int = 0
    """Checkpoint to use; 0 is the newest."""
    device: str = "auto"
    """`auto`, `cpu`, `cuda` or `cuda:N`."""

    def validate(self) -> None:
        """Raise UserError for values outside their range."""
        _check_range(
            self,
            tokens=(1, 1_000_000),
            temperature=(0.0, 100.0),
            top_k=(0, 4_194_304),
            top_p=(1e-6, 1.0),
            seed=(0, 2**63 - 1),
            step=(0, 1_000_000_000),
        )
        _check_text(self, "prompt")
        RuntimeConfig(device=self.device).validate()


@dataclass(frozen=True)
class EvaluateConfig:
    """Everything `eco_train evaluate` can be told."""

    run: str = "runs/sigma_main"
    """Run directory of the trained model."""
    step: int = 0
    """Checkpoint to use; 0 is the newest."""
    batches: int = 0
    """Batches of the validation split to score; 0 is all of it."""
    batch_size: int = 0
    """Sequences in a batch; 0 is the run's."""
    seq_len: int = 0
    """Tokens in a sequence; 0 is the run's."""
    device: str = "auto"
    """`auto`, `cpu`, `cuda` or `cuda:N`."""
    json: bool = False
    """Print one JSON object instead of a sentence."""

    def validate(self) -> None:
        """Raise UserError for values outside their range."""
        _check_range(
            self,
            step=(0, 1_000_000_000),
            batches=(0, 1_000_000_000),
            batch_size=(0, 65_536),
            seq_len=(0, 1_048_576),
        )
        RuntimeConfig(device=self.device).validate()


@dataclass(frozen=True)
class CompareConfig:
    """What `eco_train compare` can be told beside the flags of `eco_train train`, which both sides get."""

    a: str = ""
    """Flags of side A alone, in quotes."""
    b: str = ""
    """Flags of side B alone, in quotes."""
    a_rev: str = ""
    """Git revision of eco-llm that A runs; empty is the code as it is."""
    b_rev: str = ""
    """Git revision of eco-llm that B runs; empty is the code as it is."""
    pairs: int = 0
    """Pairs of windows, one of A and one of B each; 0 is 40 in turns, and up to 400 while the interval is wider than
    ±2%, or 10 in separate processes."""
    window_steps: int = 5
    """Measured steps of a window; in separate processes it is --perf-measure-steps."""
    separate: bool = False
    """A fresh process for every window, instead of two live ones that take turns and share the memory."""
    gate_steps: int = 10
    """First steps in which both sides must learn the same before any speed is reported; 1 compares only loss and
    gradient norm of the untrained models."""
    gate_tolerance: float = 0.0
    """Largest relative difference of the first losses; 0 is 1e-4 in fp32 and 2e-3 in bf16. A larger one than 0.02,
    the limit for gradient norms and for progress, widens these too."""
    min_effect: float = 0.0
    """Smallest difference in percent that is called faster or slower; 0 is 2 on a CPU and 1 on a GPU."""

    def validate(self) -> None:
        """Raise UserError for counts that cannot give a verdict."""
        _check_range(
            self,
            pairs=(0, 1000),
            window_steps=(1, 1_000_000),
            gate_steps=(1, 1000),
            gate_tolerance=(0.0, 1.0),
            min_effect=(0.0, 100.0),
        )
        if 0 < self.pairs < FEWEST_PAIRS:
            raise UserError(f"--pairs {self.pairs}: fewer than {FEWEST_PAIRS} pairs cannot give a 99% interval")


FEWEST_PAIRS = 8
"""Seven equal signs in a row still have a probability above 1% (2 / 2^7): no interval could exclude anything."""


@dataclass(frozen=True)
class PrepareConfig:
    """Everything `eco_train data prepare` and `eco_train data inspect` can be told."""

    data: DataConfig = field(default_factory=DataConfig)
    vocab_size: int = SigmaConfig.vocab_size
    """Size of a tokenizer trained here."""
    path: str = ""
    """`inspect` only: a prepared data set's folder, instead of the one the data flags name."""
    verify: bool = False
    """`inspect` only: read every shard and check its checksum."""
    json: bool = False
    """Print one JSON object instead of a table."""

    def validate(self) -> None:
        """Raise UserError for settings that cannot work."""
        self.data.validate()
        _check_range(self, vocab_size=(257, 4_194_304))


@dataclass(frozen=True)
class ReportConfig:
    """What `eco_train report` can be told, besides the run directories."""

    out: str = ""
    """Folder for PROOF_OF_EVOLUTION.md and report.html; the last named run's by default."""


@dataclass(frozen=True)
class WatchConfig:
    """What `eco_train watch` can be told, besides the run directory."""

    port: int = 8765
    """Port on 127.0.0.1; 0 takes a free one."""

    def validate(self) -> None:
        """Raise UserError for a number that is no port."""
        _check_range(self, port=(0, 65_535))
