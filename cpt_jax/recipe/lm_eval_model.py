"""A model of this project for the Language Model Evaluation Harness (Gao et al., `lm_eval`), under the name "cpt_jax".

`lm_eval` looks for no plug-ins: a model is known once the module that registers it was imported. `cpt lm-eval` imports
this one and hands its arguments on; a program imports it and calls `lm_eval.simple_evaluate(model="cpt_jax", ...)`.
"""

import contextlib
import itertools
from collections.abc import Sequence
from typing import Any, Literal, get_args

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model

# This import registers the harness's own models, which it does not do by itself once another one is there.
from lm_eval.models.utils import (
    handle_stop_sequences,
    has_bos_prefix,
    normalize_gen_kwargs,
    postprocess_generated_text,
)
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from transformers import AutoTokenizer

from cpt_jax.core.errors import UserError
from cpt_jax.core.precision import Precision
from cpt_jax.core.progress import progress
from cpt_jax.evaluate.token_scores import Score, TokenPair, score_continuations
from cpt_jax.models.generate import Generation
from cpt_jax.recipe.find import find_model
from cpt_jax.recipe.grow import check_fits
from cpt_jax.recipe.model import load_model
from cpt_jax.vocab.tokenizer import Tokenizer

Compute = Literal["float32", "bfloat16", "float16"]
# What `batch_size` counts: sequences of so many tokens; of shorter ones there are more, of longer ones fewer.
SEQUENCE_LENGTH = 512


@register_model("cpt_jax")
class HarnessModel(TemplateLM):
    """A decoder in JAX. Text becomes tokens by the tokenizer that transformers reads from the model's directory, as for
    the harness's own "hf" model, so that both score the same tokens.

    Args:
      pretrained: a HF directory, a .gguf file or a hub id.
      batch_size: sequences of 512 tokens that are read at once; there is no search for the largest ("auto").
      max_length: tokens read at once (default: the model's context).
      device: not used, JAX has its own choice (JAX_PLATFORMS); `lm_eval` gives every model its default, "cuda:0".
    """

    def __init__(
        self,
        pretrained: str,
        batch_size: int | str = 1,
        max_length: int | None = None,
        dtype: Compute = "float32",
        device: str | None = None,
    ) -> None:
        super().__init__()
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise UserError(f"batch_size is {batch_size!r}: give a number of sequences from 1")
        if dtype not in get_args(Compute):
            raise UserError(f"dtype is {dtype!r}: give {' or '.join(get_args(Compute))}")
        directory = find_model(pretrained)
        model = load_model(directory)
        check_fits(Tokenizer(directory), model.config.total_rows, directory)
        context = model.config.context_length
        if max_length is not None and not 1 <= max_length <= context:
            raise UserError(f"max_length is {max_length}: give 1 to {context}, the model's context")
        self.tokenizer: Any = AutoTokenizer.from_pretrained(directory)
        self.batch_size = int(batch_size)
        self.max_length = max_length or context
        self.max_gen_toks = 256
        self._precision = Precision(compute=dtype)
        self._network, self._weights = model.network, model.on_device(self._precision)

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text that has no context: the tokenizer's bos token, or its eos token."""
        start = self.tokenizer.bos_token_id
        return self.eot_token_id if start is None else start

    @property
    def tokenizer_name(self) -> str:
        return self.tokenizer.name_or_path.replace("/", "__")

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs) -> list[int]:
        """Token ids; by default with the special tokens that the tokenizer adds, unless the text begins with one, as
        a chat template's does."""
        if add_special_tokens is None:
            add_special_tokens = not has_bos_prefix(string, self.tokenizer.decode(self.prefix_token_id))
        return self.tokenizer.encode(string, add_special_tokens=add_special_tokens)

    def _scores(self, pairs: Sequence[TokenPair], shown: bool = True) -> list[Score]:
        with progress("log-likelihoods", len(pairs), "requests") if shown else contextlib.nullcontext() as bar:
            return score_continuations(
                self._network,
                self._weights,
                pairs,
                max_length=self.max_length,
                batch_tokens=self.batch_size * SEQUENCE_LENGTH,
                precision=self._precision,
                on_progress=bar.advance if bar is not None else lambda pairs: None,
            )

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], disable_tqdm: bool = False, **kwargs
    ) -> list[tuple[float, bool]]:
        pairs = [TokenPair(context=context, continuation=continuation) for _, context, continuation in requests]
        answers = [(score.log_likelihood, score.greedy) for score in self._scores(pairs, not disable_tqdm)]
        for (texts, _, _), answer in zip(requests, answers, strict=True):
            self.cache_hook.add_partial("loglikelihood", texts, answer)
        return answers

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihoods of whole texts; one that is longer than the model reads is cut into windows."""
        windows = [
            list(map(make_disjoint_window, get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, 1)))
            for ids in (self.tok_encode(request.args[0]) for request in requests)
        ]
        pairs = [TokenPair(context=context, continuation=wanted) for part in windows for context, wanted in part]
        scores = iter(self._scores(pairs, not disable_tqdm))
        totals = [sum(score.log_likelihood for score in itertools.islice(scores, len(part))) for part in windows]
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """The likeliest tokens, one after the other, up to a stop sequence."""
        texts = []
        with progress("generation", len(requests), "requests") as shown:
            for request in requests:
                texts.append(self._answer(*request.args))
                self.cache_hook.add_partial("generate_until", request.args, texts[-1])
                shown.advance()
        return texts

    def _answer(self, context: str, options: dict[str, Any]) -> str:
        settings: dict[str, Any] = {**normalize_gen_kwargs(options, self.max_gen_toks)}
        new_tokens = settings["max_gen_toks"]
        if settings["do_sample"]:
            raise UserError("do_sample is true and text is generated greedily alone: give --gen_kwargs do_sample=False")
        if (room := self.max_length - new_tokens) < 1:
            raise UserError(
                f"max_gen_toks is {new_tokens} and the model reads {self.max_length} tokens: "
                f"give --gen_kwargs max_gen_toks={self.max_length // 2}"
            )
        stop = handle_stop_sequences(settings["until"], self.tokenizer.decode([self.eot_token_id]))
        prompt = self.tok_encode(context)[-room:]
        text = self.tokenizer.decode(self._continuation(prompt, new_tokens, stop), skip_special_tokens=True)
        return postprocess_generated_text(text, stop, think_end_token=None)

    def _continuation(self, prompt: list[int], new_tokens: int, stop: Sequence[str]) -> list[int]:
        """Tokens up to the first that completes a stop sequence, or `new_tokens`."""
        generation = Generation(
            self._network,
            self._weights,
            [prompt],
            new_tokens=new_tokens,
            end_ids=(self.eot_token_id,),
            compute_dtype=self._precision.compute,
        )
        # A character may be four tokens, of a byte each.
        reach = 4 * max(map(len, stop), default=0) + 4
        produced: list[int] = []
        for _, token in generation:
            produced.append(token)
            end = self.tokenizer.decode(produced[-reach:], skip_special_tokens=True)
            if any(each in end for each in stop):
                generation.stop(0)
        return produced
