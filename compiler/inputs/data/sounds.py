"""Recordings with what is said in them, for models that hear."""

import io
import wave
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from ....dsl.syntax.diagnostics import Fault
from ...core.safe_read import DATA, read_regular_file
from ...plugin.context import Context
from ...plugin.interfaces import param
from ..records import Record, drop_or_refuse_too_long, field_text
from ..sampled_rows import SampledRows
from ..windows import content_identity, padding_token_id, require_tokenizer
from .labels import text_too_long

invalid_sound = Fault("bad-sound", "A recording can't be read, or is not such as the model hears.")
no_features = Fault(
    "no-features",
    "A recording is to become what a model hears, and the model came without what makes that of it.",
    exit="environment",
)
_WIDTHS = {1: "u1", 2: "<i2", 4: "<i4"}  # bytes of a sample -> numpy's name


class Sounds(SampledRows):
    """Recordings with what is said in them, for models that hear.

    A record names a WAV file, relative to the file of records, and has the text that is said in it. The model's own
    feature extractor (preprocessor_config.json) makes pictures of the sound, filled up or cut to the length that the
    model hears; its tokenizer makes the target, filled up to `length` tokens. Recordings are PCM of 8, 16, 24 or 32
    bits at the extractor's rate; several channels are averaged.

    `divergence`, `perplexity` and `agreement` then judge what the model says of the sounds, and `tune.heal` learns it.

    Source: own; the task of Whisper (Radford et al. 2022, arXiv 2212.04356).
    Example: data speech = sounds("clips.jsonl", length: 16)
    """

    path: str | tuple[str, ...] = param("JSONL, JSON, CSV or TSV file, glob, or list of them.", positional=True)
    sound: str = param("Field of the WAV file's path.", default="sound")
    text: str = param("Field of what is said.", default="text")
    length: int = param("Tokens of a target.", ge=2, unit="tokens")
    longer: Literal["refuse", "drop"] = param("What becomes of texts that fit into no row.", default="refuse")

    def rows(self, tokenizer: Any, ctx: Context) -> Iterator[Any]:
        import torch

        tokenizer, extract = require_tokenizer(tokenizer, ctx), _load_feature_extractor(ctx)
        recordings = [
            (self._sound_path(*entry), self._tokenize_transcript(*entry, tokenizer))
            for entry in self.records((self.sound, self.text), ctx)
        ]
        sizes = [len(ids) for _, ids in recordings]
        recordings = drop_or_refuse_too_long(recordings, sizes, self.length, self.longer, text_too_long, "texts")
        fill = padding_token_id(tokenizer, ctx)
        rows = []
        for file, ids in recordings:
            features = _extract_features(file, extract, ctx)
            target = torch.tensor([*ids, *(fill,) * (self.length - len(ids))]).float()
            rows.append(torch.cat([features.flatten(), target]))
        return self.sample(torch.stack(rows), ctx)

    def identity(self, ctx: Context) -> str:
        recordings = [self._sound_path(*entry) for entry in self.records((self.sound, self.text), ctx)]
        preprocessor = [] if ctx.origin.folder is None else [ctx.origin.folder / "preprocessor_config.json"]
        files = [*self.files(ctx), *recordings, *(f for f in preprocessor if f.is_file())]
        return content_identity("sounds", files, self.identity_facts(ctx), ctx)

    def _sound_path(self, record: Record, line_number: int, path: Path) -> Path:
        file = path.parent / field_text(record, self.sound, line_number, path)
        if not file.is_file():
            raise invalid_sound(f"record {line_number} of {path} names {file}, which is not there").rejection()
        return file

    def _tokenize_transcript(self, record: Record, line_number: int, path: Path, tokenizer: Any) -> tuple[int, ...]:
        ids = tokenizer(text_target=field_text(record, self.text, line_number, path), verbose=False)["input_ids"]
        if not ids:
            raise invalid_sound(f"record {line_number} of {path} says nothing").rejection()
        return tuple(ids)


def _load_feature_extractor(ctx: Context) -> Any:
    """Feature extractor of sounds; a class of transformers, never code of the folder."""
    from transformers import AutoFeatureExtractor

    folder = ctx.origin.folder
    if folder is None or not (folder / "preprocessor_config.json").is_file():
        raise no_features(
            f"{ctx.origin.label} has no preprocessor_config.json",
            help="take a folder that has one, or make features elsewhere and name them by `tensors`",
        ).rejection()
    return AutoFeatureExtractor.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def _extract_features(file: Path, feature_extractor: Any, ctx: Context) -> Any:
    """Pictures of one recording, [bands, frames] as the model hears them."""
    import torch

    if not all(type(ctx.origin.config.get(name)) is int for name in ("num_mel_bins", "max_source_positions")):
        raise invalid_sound(
            f"`sounds` makes features of one length, and {ctx.origin.label} takes "
            f"`{feature_extractor.model_input_names[0]}` of any",
            help='make them elsewhere, and name their file: `tensors("rows.safetensors")`',
        ).rejection()
    extracted = feature_extractor(
        _read_wav(file, feature_extractor.sampling_rate),
        sampling_rate=feature_extractor.sampling_rate,
        return_tensors="np",
    )
    features = torch.from_numpy(extracted["input_features"][0]).float()
    expected = ctx.origin.config["num_mel_bins"], 2 * ctx.origin.config["max_source_positions"]
    if tuple(features.shape) != expected:
        raise invalid_sound(
            f"the feature extractor makes {list(features.shape)} of a sound, and the model hears {list(expected)}",
            help="take the preprocessor_config.json that came with the model",
        ).rejection()
    return features


def _read_wav(file: Path, sampling_rate: int) -> Any:
    """Samples of a WAV file in -1..1, [t] float32."""
    import numpy

    try:
        with wave.open(io.BytesIO(read_regular_file(file, DATA)), "rb") as sound:
            width, channels, file_rate = sound.getsampwidth(), sound.getnchannels(), sound.getframerate()
            data = sound.readframes(sound.getnframes())
    except (wave.Error, EOFError) as error:
        raise invalid_sound(
            f"{file} is no WAV file of PCM samples", help="convert it to 16-bit PCM"
        ).rejection() from error
    if file_rate != sampling_rate:
        fact = f"{file} has {file_rate} samples a second, and the model hears {sampling_rate}"
        raise invalid_sound(fact, help=f"resample it to {sampling_rate} Hz").rejection()
    if width not in (*_WIDTHS, 3) or len(data) < width * channels:
        raise invalid_sound(
            f"{file} has {len(data)} bytes of samples of {width}", help="convert it to 16-bit PCM"
        ).rejection()
    data = data[: len(data) // (width * channels) * width * channels]  # a file that was cut off
    if width == 3:
        threes = numpy.frombuffer(data, "u1").reshape(-1, 3)
        numbers = (threes.astype("<i4") << [8, 16, 24]).sum(1, dtype="<i4")  # as the upper bytes of 32 bits
    else:
        numbers = numpy.frombuffer(data, _WIDTHS[width])
    scaled = numbers.astype("f4") / 128 - 1 if width == 1 else numbers.astype("f4") / 2 ** (31 if width > 2 else 15)
    return scaled.reshape(-1, channels).mean(1)
