"""A byte-level BPE tokenizer as GGUF keys, from tokenizer.json and tokenizer_config.json."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from onebit_ext import CheckpointError

from .config import read_json

# llama.cpp knows pre-tokenizers by name; ours is the one that cuts the probe text the same way.
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
PRE_TOKENIZERS = {"gpt-2": GPT2, "llama-bpe": LLAMA3, "qwen2": LLAMA3.replace("{1,3}", "")}
PROBE = (
    "Hello  world's we'LL I'M 3 33 333 3333 33333.5\n\n \t\tx\r\n   =====!?!?...  \n na\u00efve \u0433\u0434\u0435 "
    "\u4e2d\u6587\u5b57 \U0001f680\U0001f999 'tis (a,b) #tag\t"
)
NO_MERGE = "\u2400 \u2400"  # llama.cpp wants at least one merge; these letters are in no byte alphabet


def add_tokenizer(writer: Any, folder: Path, vocab_size: int, config: dict[str, Any], pre: str | None) -> None:
    """Add all tokenizer.* keys to a gguf.GGUFWriter.

    vocab_size: rows of the embedding; ids without a token become unused ones.  config: config.json.  pre: llama.cpp's
    name of the pre-tokenizer; None: recognised by how it cuts text.  Raises CheckpointError if the folder has no
    byte-level BPE tokenizer.
    """
    from gguf import TokenType

    raw = read_json(folder / "tokenizer.json")
    settings = read_json(folder / "tokenizer_config.json") if (folder / "tokenizer_config.json").exists() else {}
    model = raw.get("model") or {}
    if model.get("type") != "BPE" or model.get("byte_fallback") or not _byte_level(raw):
        raise CheckpointError(f"{folder}/tokenizer.json: only byte-level BPE can be written, got {model.get('type')!r}")
    names: list[str | None] = [None] * vocab_size
    kinds = [TokenType.UNUSED] * vocab_size
    added = {entry["content"]: entry for entry in raw.get("added_tokens", [])}
    for token, index in (model["vocab"] | {token: entry["id"] for token, entry in added.items()}).items():
        if index >= vocab_size:
            raise CheckpointError(f"{folder}/tokenizer.json: token {token!r} has id {index} of {vocab_size}")
        names[index], kinds[index] = token, TokenType.NORMAL
        if token in added:
            kinds[index] = TokenType.CONTROL if added[token].get("special") else TokenType.USER_DEFINED
    merges = [entry if isinstance(entry, str) else " ".join(entry) for entry in model.get("merges", [])]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre or ("gpt-2" if not merges else _recognise(folder)))
    writer.add_token_list([f"[PAD{i}]" if name is None else name for i, name in enumerate(names)])
    writer.add_token_types(kinds)
    writer.add_token_merges(merges or [NO_MERGE])
    ids = {name: i for i, name in enumerate(names) if name is not None}
    for kind, add in (
        ("bos", writer.add_bos_token_id),
        ("eos", writer.add_eos_token_id),
        ("pad", writer.add_pad_token_id),
    ):
        index = _special(kind, settings, config, ids)
        if index is not None and index < vocab_size:
            add(index)
    writer.add_add_bos_token(_adds_bos(raw, settings))
    template = _template(folder, settings)
    if template:
        writer.add_chat_template(template)


def _byte_level(raw: dict[str, Any]) -> bool:
    parts = [raw.get("pre_tokenizer") or {}, raw.get("decoder") or {}]
    flat = [part for outer in parts for part in (outer, *outer.get("pretokenizers", []), *outer.get("decoders", []))]
    return any(part.get("type") == "ByteLevel" for part in flat)


def _recognise(folder: Path) -> str:
    from tokenizers import Regex, Tokenizer
    from tokenizers.pre_tokenizers import ByteLevel, Sequence, Split

    cut = Tokenizer.from_file(str(folder / "tokenizer.json")).pre_tokenizer.pre_tokenize_str(PROBE)
    for name, pattern in PRE_TOKENIZERS.items():
        split = Sequence([Split(Regex(pattern), "isolated"), ByteLevel(add_prefix_space=False, use_regex=False)])
        if split.pre_tokenize_str(PROBE) == cut:
            return name
    raise CheckpointError(
        f"{folder}/tokenizer.json: its pre-tokenizer cuts text like none of {', '.join(PRE_TOKENIZERS)};"
        " give llama.cpp's name for it (--tokenizer-pre)"
    )


def _special(kind: str, settings: dict[str, Any], config: dict[str, Any], ids: dict[str, int]) -> int | None:
    token = settings.get(f"{kind}_token")
    token = token.get("content") if isinstance(token, dict) else token
    if token in ids:
        return ids[token]
    index = config.get(f"{kind}_token_id")
    return index[0] if isinstance(index, list) and index else index if isinstance(index, int) else None


def _adds_bos(raw: dict[str, Any], settings: dict[str, Any]) -> bool:
    if isinstance(settings.get("add_bos_token"), bool):
        return settings["add_bos_token"]
    outer = raw.get("post_processor") or {}
    for part in (outer, *outer.get("processors", [])):
        if part.get("type") == "TemplateProcessing" and part.get("single"):
            return "SpecialToken" in part["single"][0]
    return False


def _template(folder: Path, settings: dict[str, Any]) -> str | None:
    if (folder / "chat_template.jinja").exists():
        return (folder / "chat_template.jinja").read_text(encoding="utf-8")
    template = settings.get("chat_template")
    if isinstance(template, list):  # named templates
        template = next((entry.get("template") for entry in template if entry.get("name") == "default"), None)
    return template if isinstance(template, str) else None
