"""What `python -m training.data.prepare` cleans, by which rules, and how the work is spread."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from sd_mini.config import Config
from sd_mini.data.captioned import DataConfig
from sd_mini.errors import UserError
from sd_mini.files import file_hash
from sd_mini.texts import read_lines

Script = Literal[
    "latin", "cyrillic", "greek", "armenian", "georgian", "hebrew", "arabic", "ethiopic", "devanagari", "bengali",
    "gurmukhi", "gujarati", "tamil", "telugu", "kannada", "malayalam", "sinhala", "thai", "lao", "tibetan", "myanmar",
    "khmer", "mongolian", "hangul", "hiragana", "katakana", "bopomofo", "han",
]  # fmt: skip


class HeldOutConfig(DataConfig):
    """The pictures that nothing kept may repeat."""

    split: str = "test"
    """One of the source's splits."""


class HarmfulConfig(Config):
    """Step 1: rows whose caption or picture is harmful."""

    enabled: bool = True
    """Whether the step is done."""
    builtin_words: bool = True
    """Refuse captions with a term of the built-in list (training/data/prepare/words.txt)."""
    words: Path | None = None
    """A text file of further terms, one a line; a line that begins with # is a remark."""
    classifier: str | None = None
    """Null, "nudenet" (extra [safety]), or module:PACKAGE.MODULE:FUNCTION, called with pictures (N, 3, R, R) uint8 and
    N captions, which gives N booleans or probabilities."""
    threshold: float = Field(0.5, ge=0, le=1)
    """The probability from which the classifier's verdict counts."""
    resolution: int = Field(320, ge=16)
    """R of the pictures that the classifier gets, px; 320 is NudeNet's own."""


class MarkupConfig(Config):
    """Step 2: HTML and mojibake out of captions."""

    enabled: bool = True
    """Whether the step is done."""


class QualityConfig(Config):
    """Step 3: pictures and captions that teach little. A rule is off where its limit is 0 or null."""

    enabled: bool = True
    """Whether the step is done."""
    min_side: int = Field(32, ge=0)
    """Shortest side that is kept, px; set it to the resolution that will be trained at."""
    max_aspect: float = Field(3.0, ge=0)
    """Longest side over shortest that is kept."""
    min_contrast: float = Field(4.0, ge=0)
    """Standard deviation, of 0 to 255, of the picture at 24 x 24 px in its liveliest channel: less is near-blank."""
    min_sharpness: float = Field(6.0, ge=0)
    """Variance of the Laplacian of the grey picture, its short side scaled down to 128 px: less is blurred."""
    boilerplate: bool = True
    """Refuse captions that are a camera's or a file's name, an address, or hold no letter and no digit."""
    max_repeats: int | None = Field(100, ge=1)
    """Refuse a caption that stands with more different pictures than this. Off for class-like data: where there are
    fewer different captions than half the rows."""
    languages: list[Script] | None = None
    """Scripts of which more than half of a caption's letters have to be, e.g. [latin]; null takes any."""
    clip: str | None = None
    """An open_clip model, ARCHITECTURE=FILE or local-dir:FOLDER, that scores how well a caption fits its picture."""
    min_clip_score: float = Field(0.2, ge=-1, le=1)
    """Cosine of picture and caption below which a row is refused."""


class DuplicatesConfig(Config):
    """Step 4: rows that repeat another."""

    enabled: bool = True
    """Whether the step is done."""
    bits: int = Field(10, ge=0, le=20)
    """Bits of 64 in which the perceptual hashes of near-duplicates differ at most."""
    min_correlation: float = Field(0.97, ge=0, le=1)
    """Correlation of the 4 x 3 px colour thumbnails of near-duplicates at least."""
    min_jaccard: float = Field(0.9, ge=0, le=1)
    """Jaccard similarity of the captions (runs of one to three words) from which they count as the same; near-duplicate
    pictures whose captions differ more are both kept."""
    min_words: int | None = Field(20, ge=1)
    """Captions of at least so many words are compared with each other, whatever their pictures; null compares none."""


class DecontaminationConfig(Config):
    """Step 5: rows that repeat one of the test source, by the limits of step 4."""

    enabled: bool = True
    """Whether the step is done, given `test`."""
    captions: bool = True
    """Refuse captions of the test source too. Off for class-like tests: where there are fewer different captions than
    half the rows."""


class PrepareConfig(Config):
    """One cleaning: a source in, parquet shards out."""

    data: DataConfig = DataConfig()
    """the captioned pictures to clean"""
    test: HeldOutConfig | None = None
    """the captioned pictures that nothing kept may repeat"""
    harmful: HarmfulConfig = HarmfulConfig()
    markup: MarkupConfig = MarkupConfig()
    quality: QualityConfig = QualityConfig()
    duplicates: DuplicatesConfig = DuplicatesConfig()
    decontamination: DecontaminationConfig = DecontaminationConfig()
    shard_rows: int = Field(2000, ge=1)
    """Rows of an output shard, and of one task."""
    engine: Literal["processes", "ray"] = "processes"
    """Where tasks run: processes of this machine, or Ray's workers (extra [cluster])."""
    address: str | None = None
    """Of the Ray cluster, "auto" for one that runs here; null starts one on this machine."""
    workers: int | None = Field(None, ge=1)
    """Tasks at once; as many as cores if null. With one process the tasks run in the program itself."""

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if not isinstance(self.data.source, str) or (self.test is not None and not isinstance(self.test.source, str)):
            raise UserError("data.source: a mixture is cleaned a source at a time; give one")
        return self

    def located(self) -> PrepareConfig:
        """The same with absolute paths, for tasks that may run in another folder."""
        fields: dict[str, Any] = {
            part: own.model_copy(update={"source": str(Path(own.source).absolute())})
            for part in ("data", "test")
            if (own := getattr(self, part)) is not None and Path(own.source).exists()
        }
        if self.harmful.words is not None:
            fields["harmful"] = self.harmful.model_copy(update={"words": self.harmful.words.absolute()})
        return self.model_copy(update=fields)

    def content(self) -> dict[str, Any]:
        """What the output depends on, for JSON: all fields but those of the engine, and the word list by its hash."""
        fields = self.model_dump(mode="json", exclude={"engine", "address", "workers"})
        if self.harmful.words is not None:
            read_lines(self.harmful.words)  # which refuses what cannot be read
            fields["harmful"]["words"] = file_hash(self.harmful.words)
        return fields
