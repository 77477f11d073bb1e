"""The tokenizer and the base of a run, grown if its recipe says so."""

from pathlib import Path
from typing import Any

from cpt_jax.checkpoint.context import lengthen
from cpt_jax.core.checksums import sha256
from cpt_jax.core.config import fingerprint, to_json
from cpt_jax.core.errors import UserError
from cpt_jax.core.progress import number_of, say
from cpt_jax.core.storage import write_text_atomic
from cpt_jax.data.holdout import read_heldout, training_documents
from cpt_jax.data.sources import SkipCounts
from cpt_jax.recipe.context import is_read
from cpt_jax.recipe.copies import copy_tokenizer, link_directory
from cpt_jax.recipe.grow import grow_tokenizer
from cpt_jax.recipe.results import Results
from cpt_jax.recipe.rows import grow_model
from cpt_jax.recipe.stations import identity
from cpt_jax.vocab.init_rows import NEEDS_TEXT

# What `lengthen` may write: not the base's file any more.
_LENGTHENED = ("config.json", "tokenizer_config.json")


class VocabularyStations(Results):
    """The stations between holding out and training that make what the stages begin with."""

    def _training_texts(self, role: str):
        for domain in self.recipe.domains:
            if domain.role == role:
                yield from training_documents(domain.corpus, domain.heldout, self._data(domain), SkipCounts())

    def vocabulary(self) -> None:
        """The tokenizer and the base model, grown if the recipe says so."""
        recipe, tokenizer, base = self.recipe, self.path / "tokenizer", self.path / "base"
        if recipe.vocabulary is None:
            inputs = self._as_it_came(self.marks["base"])

            def copy() -> None:
                copy_tokenizer(self.source, tokenizer)
                self._write_template(tokenizer)
                self._lengthen(tokenizer)

            def link() -> None:
                link_directory(self.source, base)
                self._lengthen(base)

            self._station("tokenizer", [*inputs, self.template_given()], [tokenizer], copy, common=True)
            self._station("base-model", inputs, [base], link, common=True)
            return
        vocabulary = recipe.vocabulary
        roles = {domain.name: domain.role for domain in recipe.domains}
        upstream = [self.marks[f"hold-out-{name}"] for name in roles]

        def extend() -> None:
            say(f"tokenizer: learning {number_of(vocabulary.extension.new_tokens, 'new piece')}")
            heldout = {domain.name: read_heldout(self._data(domain)) for domain in recipe.domains}
            grow_tokenizer(
                self.source,
                vocabulary,
                lambda: self._training_texts("new"),
                lambda: self._training_texts("replay"),
                heldout,
                recipe.named("replay"),
                tokenizer,
                self.path / "fertility.json",
            )
            self._write_template(tokenizer)
            self._lengthen(tokenizer)

        outputs = [tokenizer, self.path / "fertility.json"]
        inputs = [to_json(vocabulary), self.marks["base"], upstream, self.template_given(), *self._context_given()]
        self._station("tokenizer", inputs, outputs, extend, common=True)
        # The tokenizer by its content: where other limits, or a domain that is measured only, lead to the same one, what
        # was trained with it is kept.
        grown = [self.tokenizer.fingerprint, self.template_given(), to_json(vocabulary.initial_rows), recipe.seed]
        reads = isinstance(vocabulary.initial_rows, NEEDS_TEXT)
        read: list[Any] = [self.marks[f"hold-out-{name}"] for name in recipe.named("new")] if reads else []
        read += map(identity, vocabulary.files)

        def grow() -> None:
            rows, seed = vocabulary.initial_rows, recipe.seed
            grow_model(self.source, tokenizer, rows, seed, base, lambda: self._training_texts("new"))
            self._lengthen(base)

        inputs = [self.marks["base"], grown, read, *self._context_given()]
        self._station("base-model", inputs, [base], grow, common=True)

    def _context_given(self) -> list:
        """A recipe without a longer context has the fingerprints that it had before there was such a thing."""
        return [] if self.recipe.context is None else [to_json(self.recipe.context)]

    def _as_it_came(self, content: str) -> list:
        """The inputs of a base that no vocabulary was grown for, by the fingerprint of its content."""
        return ["unchanged", content, *self._context_given()]

    def check_base(self) -> None:
        """Makes sure that the stages were trained on what is there. Its files may be the user's under another name, who may
        have written over them.

        Raises:
          UserError: they hold something else.
        """
        base = self.path / "base"
        if self.recipe.vocabulary is None and not self.workdir.is_made_of(
            "base-model", self._as_it_came(fingerprint(self._content_of(base)))
        ):
            raise UserError(
                f"{base} is not what was trained on: its files are those of {self.recipe.base}, which were written over since: "
                f"put these back, remove {base}, and run `cpt run {self.workdir.location}/config.json --workdir {self.workdir.location}`"
            )

    def _content_of(self, base: Path) -> dict[str, str]:
        """SHA-256 of the files as they came. What is still the same file as in the base is not read again."""
        of_source = self._content_of_base()
        own = () if self.recipe.context is None else _LENGTHENED
        content = {name: of_source[name] for name in own if name in of_source}
        for file in filter(is_read, base.iterdir() if base.exists() else ()):
            if file.name not in own:
                source = self.source / file.name
                is_same = source.exists() and file.samefile(source)
                content[file.name] = of_source[file.name] if is_same else sha256(file)
        return content

    def _lengthen(self, directory: Path) -> None:
        if self.recipe.context is not None:
            lengthen(directory, self.recipe.context)

    def _write_template(self, tokenizer: Path) -> None:
        if (template := self.template_given()) is not None:
            write_text_atomic(tokenizer / "chat_template.jinja", template)
