"""Ask a trained model: `lightweight chat DIR`, on the model or adapter that `lightweight train` saved there.

A prompt is marked up as it was in training, where every row was one turn and its answer; so each prompt is answered by
itself, until the token that ended the answers there.
"""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightweight.preload import peft  # isort: skip  # before transformers, which may import it

import torch
from safetensors import safe_open
from transformers import TextStreamer
from transformers.quantizers.auto import AutoQuantizationConfig

from lightweight import corpus, models, record
from lightweight.child import reaper
from lightweight.cli.output import RECORD_NAME
from lightweight.models import Model
from lightweight.targets import has_bf16

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class ChatError(ValueError):
    """A folder that cannot be talked to. The message names it and the mend."""


REFUSALS = (ChatError, models.ModelError, record.RecordError)
"""What is raised where there is nothing to talk to, each with one clear line."""


@dataclass(frozen=True)
class Chat:
    """A trained network with its tokenizer, from `folder`."""

    folder: Path
    network: Any
    tokenizer: PreTrainedTokenizerBase

    def answer(self, text: str, *, max_tokens: int, temperature: float = 0.0, show: bool = False) -> str:
        """The answer to one prompt, of at most `max_tokens`; greedy at `temperature` 0. `show` prints it as it
        grows. Raises ChatError where settings that were saved with the network prevent one."""
        longest = getattr(self.network.config, "max_position_embeddings", None)
        prompt = corpus.encode_prompt(
            corpus.Conversation((corpus.Message("user", text),), corpus.THERAPIST), self.tokenizer
        )
        if longest:
            prompt = prompt[-max(1, longest - max_tokens) :]
        ids = torch.tensor([prompt], device=self.network.device)
        sampling = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
        streamer = TextStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True) if show else None
        end = self.tokenizer.eos_token_id
        with _refused(self.folder, "its config.json or generation_config.json"), torch.no_grad():
            row = self.network.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=max_tokens if not longest else min(max_tokens, longest - len(prompt)),
                eos_token_id=end,
                pad_token_id=end if self.tokenizer.pad_token_id is None else self.tokenizer.pad_token_id,
                streamer=streamer,
                **sampling,
            )[0]
        return str(self.tokenizer.decode(row[len(prompt) :], skip_special_tokens=True))


def load(folder: Path, progress: Callable[[str], None] = lambda text: None) -> Chat:
    """The model saved in `folder`, its base found again as `lightweight train` found it where it is an adapter. On the
    GPU if there is one. Raises ChatError, RecordError and ModelError."""
    if not folder.is_dir():
        raise ChatError(f"{folder}: no such folder: give one that `lightweight train` wrote")
    saved = Model(name=str(folder), source=str(folder), location=str(folder))
    device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    dtype = torch.float32
    if device.type == "cuda":
        dtype = torch.bfloat16 if has_bf16(torch.cuda.get_device_capability(device)) else torch.float16
    progress("loading")
    if (folder / "adapter_config.json").is_file():
        network: Any = _adapted(folder, dtype, device, progress)
    elif (folder / "config.json").is_file():
        network = models.load(saved, dtype, device, None)
    else:
        raise ChatError(f"{folder}: holds neither an adapter nor a model: give a folder that `lightweight train` wrote")
    for name, tensor in network.named_parameters():
        if tensor.is_floating_point() and tensor.isnan().any():
            raise ChatError(f"{folder}: {name} holds what is no number: train it anew")
    return Chat(folder, network.eval(), models.load_tokenizer(saved))


@contextlib.contextmanager
def _refused(folder: Path, what: str) -> Iterator[None]:
    """Whatever is raised while files of `folder` are read is about them: one line, as a ChatError. What is about this
    machine (memory, disk) goes through."""
    try:
        yield
    except REFUSALS:
        raise
    except Exception as error:
        if models.ran_out(error):
            raise
        problem = f"{folder}: {what} cannot be used ({models.reason(error)})"
        raise ChatError(f"{problem}: give a whole folder that `lightweight train` wrote") from error


def _adapted(folder: Path, dtype: torch.dtype, device: torch.device, progress: Callable[[str], None]) -> Any:
    """The base network with the adapter in `folder` on it, of which every tensor has its place."""
    weights = folder / "adapter_model.safetensors"
    if not weights.is_file():  # peft would also load a pickle, or ask the hub
        raise ChatError(f"{folder}: has no {weights.name}: only safetensors are loaded: save the adapter as such")
    with _refused(folder, weights.name), safe_open(weights, "pt") as file:
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    stored, largest = set(shapes), max((size for shape in shapes.values() for size in shape), default=0)
    with _refused(folder, "its adapter_config.json or record"):
        config = peft.PeftConfig.from_pretrained(str(folder))
        if (rank := getattr(config, "r", 0)) > largest:  # for which peft would take memory before it compares sizes
            raise ValueError(f"rank {rank}, where no tensor has over {largest} rows or columns")
        base = _base(folder, str(config.base_model_name_or_path), dtype, device, progress)
    with _refused(folder, "its adapter"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Found missing adapter keys")  # said below, in one line
        network = peft.PeftModel.from_pretrained(base, folder)
        expected = set(peft.get_peft_model_state_dict(network, save_embedding_layers=False))
        known = expected | set(network.state_dict())  # embeddings may be saved with an adapter
    if differ := sorted((expected - stored) | (stored - known)):
        which = "is missing" if differ[0] in expected else "has no place in the network"
        raise ChatError(f"{folder}: {differ[0]} {which}: {weights.name} and adapter_config.json are of two adapters")
    return network


def _base(folder: Path, name: str, dtype: torch.dtype, device: torch.device, progress: Callable[[str], None]) -> Any:
    """The network `name` under the adapter in `folder`, quantized as it was when the adapter was trained."""
    entry = record.load(folder / RECORD_NAME).entries[0]
    base, _ = models.find(models.named(name), entry.weights)
    quantization = AutoQuantizationConfig.from_dict(dict(entry.quantization)) if entry.quantization else None
    if base.is_loadable:
        return models.load(base, dtype, device, quantization)
    with reaper.own.temporary_folder() as scratch:
        progress(f"{base.name}: writing its weights")
        return models.load(models.write(base, scratch, entry.seed or 0), dtype, device, quantization)


def talk(chat: Chat, *, max_tokens: int, temperature: float) -> None:
    """Answer standard input line by line until it ends; on a terminal with a prompt to type at."""
    at_terminal = sys.stdin.isatty()
    if at_terminal:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  # input() then has a history
    while True:
        try:
            text = input("> " if at_terminal else "")
        except EOFError:
            return
        if text.strip():
            chat.answer(text, max_tokens=max_tokens, temperature=temperature, show=True)
