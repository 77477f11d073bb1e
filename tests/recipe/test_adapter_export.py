"""An exported adapter finds its base, or its card says how, wherever it lies."""

import dataclasses
import json
import re
import shutil
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
from inputs import chinese, english, write_jsonl
from transformers import AutoModelForCausalLM

from cpt_jax.adapt import Full, LoRA
from cpt_jax.checkpoint.hub import is_hub_id
from cpt_jax.core.errors import UserError
from cpt_jax.core.precision import Precision
from cpt_jax.data.holdout import Holdout
from cpt_jax.data.sources import Corpus
from cpt_jax.optim.optimizer import AdamW
from cpt_jax.recipe.recipe import Domain, Evaluation, Export, Recipe, Stage, Vocabulary
from cpt_jax.recipe.run import export_run, run
from cpt_jax.vocab.extend import ContinuedBPE
from cpt_jax.vocab.gate import Limits

HUB = "some/base"
GROWS = Vocabulary(extension=ContinuedBPE(new_tokens=20), limits=Limits(unreachable_pieces=1.0))


def recipe(root: Path, base: str, vocabulary: Vocabulary | None, *, new_rows: bool = True) -> Recipe:
    held = Holdout(share=0.2, max_bytes=4000)
    zh, en = write_jsonl(root / "zh.jsonl", chinese(150)), write_jsonl(root / "en.jsonl", english(100))
    method = LoRA(rank=4, alpha=8, new_rows=new_rows)
    shape = dict(batch_size=8, sequence_length=64, optimizer=AdamW(learning_rate=1e-2))
    return Recipe(
        name="adapted",
        base=base,
        domains=(
            Domain(corpus=Corpus(name="zh", spec=str(zh)), role="new", heldout=held),
            Domain(corpus=Corpus(name="en", spec=str(en)), role="replay", heldout=held),
        ),
        vocabulary=vocabulary,
        stages=(Stage(name="lora", method=method, mixture={"zh": 0.5, "en": 0.5}, tokens=1024, **shape),),
        precision=Precision(compute="float32"),
        evaluation=Evaluation(sequence_length=128),
    )


def loaded(adapter: Path, place: Path):
    """The model that the card's own lines make, the hub id and BASE being in `place`."""
    (lines,) = re.findall(r"```python\n(.*?)```", (adapter / "README.md").read_text(), flags=re.DOTALL)
    names = {"HERE": str(adapter), "BASE": str(place)}
    exec(lines.replace(f'"{HUB}"', repr(str(place))), names)
    return names["model"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
@pytest.mark.parametrize(
    ("base", "vocabulary", "new_rows"),
    [(HUB, None, True), (HUB, GROWS, True), ("local", GROWS, False)],
    ids=["of a hub id", "of a hub id, grown", "of a directory, its new rows not trained"],
)
def test_an_adapter_that_was_moved_is_loaded_as_its_card_says(
    tmp_path, monkeypatch, tiny_model, base, vocabulary, new_rows
):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_model, "local")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(tiny_model))
    run(recipe(tmp_path, base, vocabulary, new_rows=new_rows), Path("run"), only="train")
    export_run("run", Path("whole"), {})
    export_run("run", Path("adapter"), {"adapter": True})
    named = json.loads(Path("adapter/adapter_config.json").read_text())["base_model_name_or_path"]
    # Rows that have no place in the base are to be made room for: the name alone would not do.
    assert named == (HUB if base == HUB and vocabulary is None else str(tmp_path / "run" / "base"))
    adapted = loaded(
        Path("adapter").rename("moved"), tiny_model if base == HUB else Path("run/base").rename("elsewhere")
    )
    whole, tokens = AutoModelForCausalLM.from_pretrained("whole"), torch.tensor([[5, 310, 300, 7, 100]])
    if vocabulary is not None:
        tokens = torch.cat([tokens, torch.arange(whole.config.vocab_size - 20, whole.config.vocab_size)[None]], dim=1)
    with torch.no_grad():
        np.testing.assert_allclose(adapted(tokens).logits, whole(tokens).logits, atol=1e-4)


def test_a_directory_with_a_hub_ids_form_is_a_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert is_hub_id("models/llama")
    Path("models/llama").mkdir(parents=True)
    assert not is_hub_id("models/llama")
    assert not any(map(is_hub_id, ("./llama", "/llama", "~/llama", "a/b/c", "gs://bucket/model", "models/a.gguf")))


@pytest.mark.parametrize(
    "methods",
    [(Full(),), (LoRA(rank=2, alpha=2), LoRA(rank=2, alpha=2))],
    ids=["all weights", "adapters merged by a second stage"],
)
def test_what_cannot_leave_as_an_adapter_is_told_before_it_is_trained(tmp_path, monkeypatch, tiny_model, methods):
    monkeypatch.chdir(tmp_path)
    given = recipe(tmp_path, str(tiny_model), None)
    stages = [
        dataclasses.replace(given.stages[0], name=str(number), method=method) for number, method in enumerate(methods)
    ]
    given = dataclasses.replace(given, stages=tuple(stages), export=Export(adapter=True))
    with pytest.raises(
        UserError, match=r"an adapter cannot hold 7 .*'layers/attention/k/kernel'.*export the whole model"
    ):
        run(given, Path("run"))
    assert not Path("run/stages").exists()
