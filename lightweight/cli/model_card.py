"""What a trained model says of itself: a model card, from nothing but the record of its training."""

from __future__ import annotations

from huggingface_hub import ModelCard, ModelCardData

from lightweight.record import Entry, training_loss


def model_card(entry: Entry, base_model: str | None) -> ModelCard:
    """The card of the model whose training is recorded in `entry`; `base_model` is its base's id on the hub, if any."""
    adapted = entry.adapter is not None
    data = ModelCardData(
        base_model=base_model,
        library_name="peft" if adapted else "transformers",
        pipeline_tag="text-generation",
        tags=["lightweight", entry.method],
    )
    weights = "random weights, so losses say nothing about quality" if entry.weights == "random" else "pretrained"
    if file := entry.weights_file:
        weights += f", from {file}: stored in fewer bits and dequantized, so not quite the original's"
    losses, per_epoch = entry.train_loss or (), entry.steps_per_epoch or 1
    began, ended = training_loss(losses, per_epoch) or (losses[0], losses[-1])
    part = "epoch" if len(losses) >= 2 * per_epoch else "tenth of the steps"
    rows = f"{per_epoch} an epoch, rows of at most {entry.max_length} tokens, seed {entry.seed}"
    facts = {
        "base model": f"{entry.model} ({weights})",
        "method": _method(entry),
        "corpus": f"{entry.trained_on}, sha256 `{entry.corpus_digest}`",
        "loss": f"on {entry.loss_on} of the assistant's turns",
        "optimizer steps": f"{len(losses)} ({rows})",
        "device": entry.device,
    }
    counts = {"cut": entry.truncated_sequences, "split": entry.split_examples, "left out": entry.dropped_examples}
    if too_long := [f"{count} {what}" for what, count in counts.items() if count]:
        facts["too long"] = ", ".join(too_long)
    nats = {
        f"training, mean of the first {part}": began,
        f"training, mean of the last {part}": ended,
        "held out, before training": entry.heldout_loss_before,
        "held out, after training": entry.heldout_loss_after,
    }
    installed = {name: version for name, version in (entry.versions or {}).items() if version}
    packages = {name: version for name, version in installed.items() if not name.startswith("pytest")}
    changed = "transform" in (entry.own_code or {})
    parts = [
        f"---\n{data.to_yaml()}\n---",
        f"# {_cell(entry.model)}, fine-tuned by {_cell(entry.method)}",
        _table("", "", facts),
        "## Losses",
        "Cross-entropy of the answers, in nats a token; held out: what of the corpus was not trained on."
        + (" Those of training are the method's own loss, on another scale." if entry.has_own_loss else ""),
        _table("", "loss", {name: f"{loss:.4f}" for name, loss in nats.items()}),
        *(
            ["They are of the network as the method's transform left it, which is code and not in these files."]
            * changed
        ),
        "## Use",
        "`lightweight chat` with this folder answers prompts."
        + (" `PeftModel.from_pretrained(base, folder)` puts the adapter on its base model." if adapted else ""),
        "## Versions",
        _table("package", "version", packages),
    ]
    return ModelCard("\n\n".join(parts) + "\n")


def _method(entry: Entry) -> str:
    """The method in a line: its name, adapter, quantization, precision and training arguments."""
    parts = [f"{entry.method}: {entry.precision}"]
    if adapter := entry.adapter:
        rank = f" r={adapter['r']}" if "r" in adapter else ""
        layers = entry.adapted_layers or adapter.get("target_modules")
        parts.append(f"{adapter['peft_type']}{rank} on {_names(layers)}")
    else:
        parts.append("all parameters")
    quantization = entry.quantization or {"quant_method": entry.base_quantization}
    if quantization["quant_method"]:
        parts.append(f"base quantized by {quantization['quant_method']}")
    parts += [f"{name}={value}" for name, value in (entry.training_arguments or {}).items()]
    parts += [f"its own {name}" for name in entry.own_code or {}]
    if entry.data_note:
        parts.append(entry.data_note)
    if entry.captured_step:
        note = "" if entry.captured else entry.capture_note  # where other steps ran than were asked for
        parts.append("captured step" + (f" ({note})" if note else ""))
    return ", ".join(parts)


def _names(modules: object) -> str:
    return " ".join(map(str, modules)) if isinstance(modules, (list, tuple)) else str(modules)


def _table(left: str, right: str, rows: dict[str, str]) -> str:
    lines = [f"| {left} | {right} |", "|---|---|", *(f"| {_cell(a)} | {_cell(b)} |" for a, b in rows.items())]
    return "\n".join(lines)


def _cell(text: str) -> str:
    """`text` where a line of markdown is: no cell, line or tag of it ends here."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")
