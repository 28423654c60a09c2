"""Ask a trained model: `lightweight chat DIR`, on the model or adapter that `lightweight train` saved there.

What is asked is marked up as it was in training. A model that was trained on conversations is told the dialogue so far;
one that was trained on single turns answers each prompt by itself. Answers end with the token that ended them there.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightweight.preload import peft  # isort: skip  # before transformers, which may import it

import torch
from safetensors import safe_open
from transformers import TextStreamer
from transformers.quantizers.auto import AutoQuantizationConfig

from lightweight import corpus, models, record
from lightweight.child import failure, reaper
from lightweight.cli.output import RECORD_NAME
from lightweight.cli.terminal import leave_to_us, refuse, show, tell
from lightweight.corpus import Conversation, Example, Message, Text
from lightweight.models import Model
from lightweight.names import is_text
from lightweight.targets import has_bf16

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class ChatError(ValueError):
    """A folder that cannot be talked to, or a question that cannot be put. The message names it and the mend."""


COMMAND = re.compile(r"/[a-z]+")
"""What a line of a dialogue is taken for a command by, known or not; a prompt that begins so has more to say."""

REFUSALS = (ChatError, models.ModelError, record.RecordError)
"""What is raised where there is nothing to talk to, each with one clear line."""


@dataclass(frozen=True)
class Chat:
    """A trained network with its tokenizer, from `folder`, and what it was trained on."""

    folder: Path
    network: Any
    tokenizer: PreTrainedTokenizerBase
    trained_on: corpus.Kind = "pairs"

    def answer(self, begun: Example, *, max_tokens: int, temperature: float = 0.0, show: bool = False) -> str:
        """The answer to what has `begun`, a dialogue up to a user's turn or the prompt of a text, of at most
        `max_tokens`; greedy at `temperature` 0. `show` prints it as it grows. Of a dialogue that has no room beside it
        the first turns go, and of a prompt its beginning, which is told; half of the model's positions are theirs at
        least. Raises ChatError where settings that were saved with the network prevent one."""
        longest = getattr(self.network.config, "max_position_embeddings", None)
        prompt = self._prompt(begun, max(longest - max_tokens, longest // 2) if longest else None)
        ids = torch.tensor([prompt], device=self.network.device)
        sampling = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
        streamer = TextStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True) if show else None
        end = self.tokenizer.eos_token_id
        with _refused(self.folder, "its config.json or generation_config.json"), torch.no_grad():
            row = self.network.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=max_tokens if not longest else min(max_tokens, longest - len(prompt)),
                eos_token_id=corpus.ends_of_answers(self.tokenizer),
                pad_token_id=end if self.tokenizer.pad_token_id is None else self.tokenizer.pad_token_id,
                streamer=streamer,
                **sampling,
            )[0]
        return str(self.tokenizer.decode(row[len(prompt) :], skip_special_tokens=True))

    def _prompt(self, begun: Example, room: int | None) -> list[int]:
        """The ids of what has `begun`, its end where there is only `room` for that."""
        prompt = corpus.encode_prompt(begun, self.tokenizer)
        while room is not None and len(prompt) > room and isinstance(begun, Conversation):
            shorter = _without_first_turn(begun)
            if shorter == begun:
                break
            begun = shorter
            prompt = corpus.encode_prompt(begun, self.tokenizer)
        if room is None or len(prompt) <= room:
            return prompt
        tell(f"the prompt has {len(prompt):,} tokens: only the last {room:,} fit beside an answer")
        return prompt[-room:]


def _without_first_turn(begun: Conversation) -> Conversation:
    """`begun` without its first turn and the answer to it; itself where there is no answer yet."""
    system = [message for message in begun.messages[:1] if message.role == "system"]
    answers = [index for index, message in enumerate(begun.messages) if message.role == "assistant"]
    if not answers:
        return begun
    return Conversation((*system, *begun.messages[answers[0] + 1 :]), begun.answerer)


@dataclass
class Dialogue:
    """What is said to a model, turn by turn: all of it so far, where it was trained on conversations; else each by
    itself. Raises ChatError for a `system` message to a model that was trained without."""

    chat: Chat
    system: str | None = None
    turns: list[Message] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.system is not None and not self.remembers:
            raise ChatError(
                f"--system: {self.chat.folder} was trained on {self.chat.trained_on}, which have no system message: "
                "leave it out"
            )

    @property
    def remembers(self) -> bool:
        """Whether the model knows conversations."""
        return self.chat.trained_on == "conversations"

    def say(self, text: str, **how: Any) -> str:
        """The answer to `text`; `how` is as for `Chat.answer`. One that was cut short is forgotten with its turn."""
        said = [*self.turns, Message("user", text)]
        answer = self.chat.answer(self._begun(said, text), **how)
        if self.remembers:
            self.turns = [*said, Message("assistant", answer.strip())]
        return answer

    def new(self) -> None:
        """Forget what was said; the system message stays."""
        self.turns = []

    def undo(self) -> bool:
        """Take the last turn and its answer back; whether there was one."""
        had = bool(self.turns)
        self.turns = self.turns[:-2]
        return had

    def _begun(self, said: list[Message], text: str) -> Example:
        if self.chat.trained_on == "texts":
            return Text(text, "")
        system = [] if self.system is None else [Message("system", self.system)]
        if self.remembers:
            return Conversation((*system, *said))
        return Conversation((Message("user", text),), corpus.THERAPIST)


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
            raise ChatError(f"{folder}: {name} holds NaN: train it again")
    return Chat(folder, network.eval(), models.load_tokenizer(saved), _trained_on(folder))


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
        raise ChatError(
            f"{folder}: {differ[0]} {which}: {weights.name} and adapter_config.json belong to different adapters"
        )
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
        try:
            written = models.write(base, scratch, entry.seed or 0)
        except Exception as error:
            if (full := failure.full_disk(error, scratch)) is None:
                raise
            raise ChatError(f"{folder}: its base weights cannot be written: {full}") from error
        return models.load(written, dtype, device, quantization)


def _trained_on(folder: Path) -> corpus.Kind:
    """What the model in `folder` was trained on, as its record says; single turns where it has none."""
    path = folder / RECORD_NAME
    if not path.is_file():
        return "pairs"
    with _refused(folder, RECORD_NAME):
        return record.load(path).entries[0].trained_on


def talk(dialogue: Dialogue, **how: Any) -> None:
    """Answer standard input line by line until it ends; on a terminal with a prompt to type at. Of a model that knows
    conversations the lines are one, `/new` begins another, and `/undo` takes the last turn back; another command is
    told, and not said to the model. Raises ChatError for a line that is not UTF-8."""
    at_terminal = sys.stdin.isatty()
    if at_terminal:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  # input() then has a history
    while True:
        try:
            text = input("> " if at_terminal else "")
        except EOFError:
            if at_terminal:
                print()
            return
        if not is_text(text):
            raise ChatError("standard input: a line is not UTF-8: type or write it in that encoding")
        match text.strip():
            case "":
                pass
            case "/new" if dialogue.remembers:
                dialogue.new()
            case "/undo" if dialogue.remembers:
                if not dialogue.undo():
                    print("nothing was said yet", file=sys.stderr)
            case command if dialogue.remembers and COMMAND.fullmatch(command):
                print(
                    f"{command}: is not a command: /new begins a dialogue, /undo takes a turn back",
                    file=sys.stderr,
                )
            case _:
                dialogue.say(text, show=True, **how)


def answer_file(chat: Chat, path: Path, system: str | None, **how: Any) -> None:
    """Answer each of the prompts in `path` by itself, to standard output as JSON lines: `prompt` and `answer`, or
    `messages` with the answer. A file called .jsonl has a text a line, `{"prompt": ...}` or `{"messages": [...]}`; any
    other has a prompt a line. Raises ChatError, for a defect before anything is answered."""
    every = list(_asked(path))
    if chat.trained_on != "conversations" and any(not isinstance(asked, str) and len(asked) > 1 for asked in every):
        raise ChatError(f"{path}: has a dialogue, but {chat.folder} was trained on {chat.trained_on}: ask one turn")
    for asked in every:
        if isinstance(asked, str):
            answer = Dialogue(chat, system).say(asked, **how)
            told: dict[str, Any] = {"prompt": asked, "answer": answer}
        else:
            own = asked[0].content if asked[0].role == "system" else system
            turns = [message for message in asked if message.role != "system"]
            answer = Dialogue(chat, own, turns[:-1]).say(turns[-1].content, **how)
            said = [*asked, Message("assistant", answer)]
            told = {"messages": [{"role": message.role, "content": message.content} for message in said]}
        print(json.dumps(told, ensure_ascii=False), flush=True)


def _asked(path: Path) -> Iterator[str | list[Message]]:
    """The prompts and dialogues in `path`."""
    try:
        lines = path.read_text("utf-8-sig").split("\n")  # JSON strings may hold other ends of lines
    except (OSError, UnicodeDecodeError) as error:
        raise ChatError(f"--prompt {path}: cannot be read ({models.reason(error)}): give a UTF-8 text file") from error
    filled = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not filled:
        raise ChatError(f"--prompt {path}: has no prompt: write one per line")
    for number, line in filled:
        if path.suffix != ".jsonl":
            yield line
            continue
        try:
            yield _asked_in(json.loads(line))
        except (ValueError, RecursionError) as error:
            mend = 'write a text, {"prompt": "..."} or {"messages": [...]}'
            raise ChatError(f"--prompt {path}: line {number}: {models.reason(error)}: {mend}") from error


def _asked_in(given: Any) -> str | list[Message]:
    """Raises ValueError."""
    if isinstance(given, dict):
        given = given.get("prompt", given.get("messages"))
    if isinstance(given, str) and given.strip():
        return _text(given)
    if not isinstance(given, list):
        raise ValueError("no prompt and no messages")
    messages = [_message(one) for one in given]
    roles = [message.role for message in messages]
    turns = roles[1:] if roles[:1] == ["system"] else roles
    if not turns or turns != ["user", "assistant"] * (len(turns) // 2) + ["user"]:
        raise ValueError("messages that are not turns of user and assistant, ending with the user's")
    return messages


def _message(given: Any) -> Message:
    match given:
        case {"role": "system" | "user" | "assistant" as role, "content": str(content)}:
            return Message(role, _text(content))
    raise ValueError("a message without a role (system, user, assistant) or a text as content")


def _text(given: str) -> str:
    """Raises ValueError."""
    if not is_text(given):
        raise ValueError("half of a surrogate pair, which is not a character")
    return given


def command(options: argparse.Namespace) -> int:
    """Answer what `options` ask; the exit status."""
    leave_to_us()
    how = {"max_tokens": options.max_tokens, "temperature": options.temperature}
    try:
        model = load(options.folder, progress=show)
        show("")
        if options.prompt is not None and (_is_file(options.prompt) or _is_called_as_one(options.prompt)):
            answer_file(model, Path(options.prompt), options.system, **how)
        elif options.prompt is not None:
            Dialogue(model, options.system).say(options.prompt, show=True, **how)
        else:
            talk(Dialogue(model, options.system), **how)
    except REFUSALS as error:
        return refuse(error)
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    return 0


def _is_file(text: str) -> bool:
    try:
        return Path(text).is_file() or Path(text).is_fifo()  # as a shell's <(...) names one
    except (OSError, ValueError):  # too long for a path, or with a null in it
        return False


def _is_called_as_one(text: str) -> bool:
    """Whether `text` is the name of a file, be there one or not, rather than something to say."""
    return text.endswith(".jsonl") and len(text.split()) == 1
