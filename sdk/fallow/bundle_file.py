"""A bundle on the submitter's machine: its manifest, its digest, and where the bytes of its files are.

On disk a bundle is a folder `NAME.bundle/` with `manifest.pb` (the exact manifest bytes) and its files beside it.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final, TypedDict, Unpack

from fallow.bundle import BundleFile, BundleManifest, BytesCodec, Precision, TopKHead, VariantForm
from fallow.errors import FallowError, Reason
from fallow.ids import Digest, digest_of
from fallow.limits import BUNDLE_FILES_MAX, MANIFEST_BYTES_MAX
from fallow.wire.bundle import decode_manifest, encode_manifest

if TYPE_CHECKING:
    from fallow.sources import Rows

MANIFEST_NAME: Final = "manifest.pb"
BUNDLE_SUFFIX: Final = ".bundle"
VARIANTS_NAME: Final = "variants"

FileSource = Path | bytes
"""Where a file's bytes are: on disk or in memory."""


class About(TypedDict, total=False):
    """What a manifest tells people; every entry may be left out."""

    name: str
    """Short name; the model file's name when left out."""
    precision: Precision
    """What the submitter promises to accept; fp32 when left out."""
    title: str
    publisher: str
    purpose: str
    url: str
    licence: str


class Bundle:
    """A bundle ready to be submitted. Make one with `from_onnx`, `from_bytes_model`, `magika` or `load`."""

    __slots__ = ("digest", "files", "manifest", "manifest_bytes", "variants")

    def __init__(
        self,
        manifest: BundleManifest,
        files: Mapping[str, FileSource],
        *,
        stored: bytes | None = None,
        variants: Mapping[VariantForm, Bundle] | None = None,
    ) -> None:
        """Binds a manifest to the bytes of its files.

        `stored` are the exact manifest bytes when they exist already; they are never serialised again.
        Raises BUNDLE_INVALID when a file is missing or the manifest is too long.
        """
        self.manifest = manifest
        self.files = dict(files)
        """Where each file's bytes are, by name."""
        self.manifest_bytes = encode_manifest(manifest) if stored is None else stored
        """The exact bytes that the digest is of."""
        self.digest = digest_of(self.manifest_bytes)
        """What names the bundle everywhere."""
        self.variants = dict(variants or {})
        """Other forms of it that are at hand, each a bundle of its own."""
        named = {variant.form: variant.bundle_digest for variant in manifest.variants}
        if any(named.get(form) != variant.digest for form, variant in self.variants.items()):
            raise FallowError(
                Reason.BUNDLE_INVALID, "a variant is not the one that the manifest names", field="variants"
            )
        if len(self.manifest_bytes) > MANIFEST_BYTES_MAX or len(manifest.files) > BUNDLE_FILES_MAX:
            raise FallowError(
                Reason.BUNDLE_INVALID,
                f"the manifest takes {len(self.manifest_bytes)} bytes and names {len(manifest.files)} files",
                field="manifest",
                limit=f"{MANIFEST_BYTES_MAX} bytes, {BUNDLE_FILES_MAX} files",
            )
        for file in manifest.files:
            if file.name not in self.files:
                raise FallowError(Reason.BUNDLE_INVALID, f"the bundle lacks its file {file.name!r}", field="files")

    def __repr__(self) -> str:
        return f"Bundle({self.manifest.name!r}, {self.digest.hex()[:12]})"

    @classmethod
    def from_onnx(
        cls,
        path: str | Path,
        *,
        outputs: Sequence[str] = (),
        shapes: Mapping[str, Sequence[int]] | None = None,
        dims: Mapping[str, int] | None = None,
        **about: Unpack[About],
    ) -> Bundle:
        """A bundle of one ONNX model whose inputs and outputs are tensors with the row axis first.

        The signature is read from the file. `outputs` names those to keep (all, when empty); `shapes` gives row shapes,
        without the row axis, of inputs or outputs that the model leaves open; `dims` gives the sizes of named
        dimensions, such as `{"sequence": 128}`. Raises BUNDLE_INVALID saying what is wrong with the file or what is
        left open.
        """
        from fallow.bundle_recipes import bundle_from_onnx

        return bundle_from_onnx(Path(path), about=about, outputs=outputs, shapes=shapes or {}, dims=dims or {})

    @classmethod
    def from_bytes_model(
        cls,
        path: str | Path,
        *,
        head_window: int,
        tail_window: int,
        head_tokens: int,
        tail_tokens: int,
        padding_token: int,
        strip_whitespace: bool = True,
        labels: Sequence[str] | str | Path,
        top_k: int = 1,
        short_label: str = "",
        short_bytes_max: int = 0,
        **about: Unpack[About],
    ) -> Bundle:
        """A bundle that labels byte strings: the head and tail windows of each become tokens of an ONNX classifier.

        The model takes one integer tensor (rows, head_tokens + tail_tokens) and gives one float tensor of scores
        (rows, labels). Only the windows travel: the first `head_window` and last `tail_window` bytes. `labels` is a
        list or a file of one UTF-8 label a line. See `fallow.bundle.BytesCodec` and `TopKHead` for the exact meaning of
        each number. Raises BUNDLE_INVALID.
        """
        from fallow.bundle_recipes import bundle_from_bytes_model

        codec = BytesCodec(
            column="bytes",
            output="tokens",
            head_window_bytes=head_window,
            tail_window_bytes=tail_window,
            head_tokens=head_tokens,
            tail_tokens=tail_tokens,
            padding_token=padding_token,
            strip_whitespace=strip_whitespace,
        )
        head = TopKHead("scores", "label", top_k, "labels.txt", short_label, short_bytes_max)
        return bundle_from_bytes_model(Path(path), codec=codec, head=head, labels=labels, about=about)

    @classmethod
    def magika(cls) -> Bundle:
        """Google's Magika file-type classifier, from the installed package `magika` (which is not imported).

        Labels are the model's best guess with its own overwrite map; files shorter than the model's least size are
        labelled `unknown`. Raises BUNDLE_INVALID when the package is not installed.
        """
        from fallow.bundle_recipes import magika_bundle

        return magika_bundle()

    @classmethod
    def load(cls, folder: str | Path) -> Bundle:
        """The bundle in `folder`, once each file's length and digest are found to be the manifest's.

        Raises BUNDLE_INVALID.
        """
        folder = Path(folder)
        try:
            stored = (folder / MANIFEST_NAME).read_bytes()
        except OSError as error:
            raise FallowError(
                Reason.BUNDLE_INVALID,
                f"{folder} is no bundle: cannot read {MANIFEST_NAME} ({error.strerror or error})",
                field=str(folder),
                hint="`fallow bundle create MODEL -o NAME.bundle` makes one",
            ) from error
        manifest = decode_manifest(stored)
        for file in manifest.files:
            path = folder / plain_name(file.name)
            found = bundle_file(file.name, path)
            if found != file:
                raise FallowError(
                    Reason.BUNDLE_INVALID,
                    f"{path} is not the file that the manifest names: its content was changed",
                    field=f"files[{file.name}]",
                    limit=f"{file.length_bytes} bytes, SHA-256 {file.digest.hex()}",
                )
        return cls(
            manifest,
            {file.name: folder / file.name for file in manifest.files},
            stored=stored,
            variants={v.form: cls.load(folder / VARIANTS_NAME / v.form.value) for v in manifest.variants},
        )

    def save(self, folder: str | Path) -> Path:
        """Writes the bundle to `folder`, which must not exist, and gives its path. Raises BUNDLE_INVALID."""
        folder = Path(folder)
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            raise FallowError(Reason.BUNDLE_INVALID, f"{folder} exists already", field=str(folder)) from None
        for name, source in self.files.items():
            target = folder / plain_name(name)
            if isinstance(source, bytes):
                target.write_bytes(source)
            else:
                shutil.copyfile(source, target)
        for form, variant in self.variants.items():
            variant.save(folder / VARIANTS_NAME / form.value)
        (folder / MANIFEST_NAME).write_bytes(self.manifest_bytes)
        return folder

    def optimized(self, *forms: VariantForm | str, samples: Rows | None = None, fixed_rows: int = 1) -> Bundle:
        """This bundle with other forms of its program beside it, made and measured here; its digest changes.

        `forms`: `fp16`, `int8`, `fixed`, `fp16-fixed`, `int8-fixed`. `samples` are rows as `client.map` takes them:
        int8 is calibrated on them, and agreement with the fp32 form is measured on up to 512; rows made from the schema
        stand in when there are none. Fixed forms take `fixed_rows` rows at once. Needs a runtime (`fallow[cpu]`).
        Raises BUNDLE_INVALID naming the form that cannot be made and why, FIELD_INVALID.
        """
        from fallow.variant_recipes import optimized

        return optimized(self, forms, samples=samples, fixed_rows=fixed_rows)


def bundle_file(name: str, source: FileSource) -> BundleFile:
    """Name, digest and length of a file. Raises BUNDLE_INVALID when it cannot be read."""
    if isinstance(source, bytes):
        return BundleFile(name, digest_of(source), len(source))
    try:
        with source.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").digest()
            return BundleFile(name, Digest(digest), file.tell())
    except OSError as error:
        raise FallowError(
            Reason.BUNDLE_INVALID, f"cannot read {source}: {error.strerror or error}", field=str(source)
        ) from error


def plain_name(name: str) -> str:
    """`name`, once it is a plain file name that stays inside its folder. Raises BUNDLE_INVALID."""
    if not name or name in {".", "..", MANIFEST_NAME, VARIANTS_NAME} or any(part in name for part in ("/", "\\", "\0")):
        raise FallowError(
            Reason.BUNDLE_INVALID, f"{name!r} is no plain file name", field="files.name", limit="no path separators"
        )
    return name
