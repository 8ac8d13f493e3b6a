"""A finished (or running) run, loaded for use: its model, its tokenizer, its settings."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from eco_llm.config import TrainConfig
from eco_llm.data.loader import evaluation_batches
from eco_llm.data.prepare import prepare
from eco_llm.data.progress import make_progress
from eco_llm.data.shards import open_prepared
from eco_llm.data.tokenizer import Tokenizer
from eco_llm.errors import UserError
from eco_llm.model.generation import generate
from eco_llm.model.sigma_llm import SigmaLLM
from eco_llm.runtime import Runtime, torch_dtype
from eco_llm.training import checkpoint
from eco_llm.training.evaluation import Validation, evaluate
from eco_llm.training.run_directory import RunDirectory

EVERY_BATCH = 2**31


@dataclass(frozen=True)
class TrainedModel:
    """What generation and evaluation need."""

    model: SigmaLLM
    tokenizer: Tokenizer
    config: TrainConfig
    runtime: Runtime
    step: int
    data_fingerprint: str
    data_folder: Path


def load(run: RunDirectory, runtime: Runtime, *, step: int = 0) -> TrainedModel:
    """Load a run's newest good checkpoint, or that of `step`.

    Raises:
        UserError: there is no run, no such checkpoint, or none that can be read.
    """
    saved = run.saved()
    config = run.saved_config()
    if step:
        path = run.checkpoints / checkpoint.folder_name(step)
        if not path.is_dir():
            have = ", ".join(str(checkpoint.step_of(p)) for p in checkpoint.listing(run.checkpoints)) or "none"
            raise UserError(f"{run.path} has no checkpoint of step {step}; it has {have}")
        try:
            loaded = checkpoint.load(path, with_optimizer=False)
        except checkpoint.DamagedCheckpoint as error:
            raise UserError(str(error)) from None
    else:
        found = newest_good(run, with_optimizer=False)
        if found is None:
            raise UserError(f"{run.path} has no checkpoint yet")
        loaded = found
    shape = dataclasses.replace(config.model, vocab_size=saved["resolved"]["vocab_size"])
    model = SigmaLLM(shape, config.instant, weights_dtype=torch_dtype(config.runtime.weights_dtype))
    model.load_state_dict(loaded.model)
    model.to(runtime.device).eval()
    tokenizer = Tokenizer.load(run.tokenizer_file)
    resolved = saved["resolved"]
    return TrainedModel(
        model, tokenizer, config, runtime, loaded.step, resolved["data_fingerprint"], Path(resolved["data_folder"])
    )


def newest_good(
    run: RunDirectory, *, with_optimizer: bool, say: Callable[[str], None] = lambda text: None
) -> checkpoint.Checkpoint | None:
    """The newest checkpoint that passes verification; damaged ones are passed over, and `say` told.

    Raises:
        UserError: there are checkpoints and every one is damaged: starting anew would hide the loss.
    """
    paths = checkpoint.listing(run.checkpoints)
    for path in reversed(paths):
        try:
            return checkpoint.load(path, with_optimizer=with_optimizer)
        except checkpoint.DamagedCheckpoint as error:
            say(f"passing over a damaged checkpoint: {error}")
    if paths:
        raise UserError(f"every checkpoint in {run.checkpoints} is damaged; --no-resume sets the run aside")
    return None


def continue_text(
    trained: TrainedModel,
    prompt: str,
    max_new_tokens: int,
    *,
    temperature: float = 0.8,
    top_k: int = 0,
    top_p: float = 0.95,
    seed: int = 0,
) -> str:
    """The prompt and its continuation, up to an end-of-text token; an empty prompt begins a text."""
    tokenizer, device = trained.tokenizer, trained.runtime.device
    ids = tokenizer.encode(prompt) or [tokenizer.eot_id]  # a text begins after the end of another
    with trained.runtime.autocast():
        out = generate(
            trained.model,
            torch.tensor([ids], device=device),
            max_new_tokens,
            temperature=temperature,
            top_k=min(top_k, trained.model.config.vocab_size),
            top_p=top_p,
            generator=torch.Generator(device).manual_seed(seed),
            stop_token=tokenizer.eot_id,
        )
    new = [i for i in out[0, len(ids) :].tolist() if i != tokenizer.eot_id and i < tokenizer.vocab_size]
    return tokenizer.decode([*(i for i in ids if i != tokenizer.eot_id), *new])


def score(trained: TrainedModel, *, batches: int = 0, batch_size: int = 0, seq_len: int = 0) -> Validation:
    """Loss over the validation split of the run's data; 0 means all batches, and the run's own shape.

    Raises:
        UserError: the data is no longer what the run was trained beside.
    """
    t = trained.config.training
    if trained.data_folder.is_dir():
        data = open_prepared(trained.data_folder)
    else:
        data = prepare(trained.config.data, trained.config.model.vocab_size, progress=make_progress())
    if data.manifest.fingerprint() != trained.data_fingerprint:
        raise UserError(f"{data.path} is not the data this run was trained on; its validation split would mean nothing")
    chunks = evaluation_batches(
        data.tokens("val"),
        batch_size=batch_size or t.batch_size,
        seq_len=seq_len or t.seq_len,
        max_batches=batches or EVERY_BATCH,
        pin_memory=trained.runtime.device.type == "cuda",
    )
    return evaluate(trained.model, chunks, trained.runtime, bytes_per_token=data.manifest.splits["val"].bytes_per_token)
