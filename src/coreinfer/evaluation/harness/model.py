"""The model type: lm-eval asks for texts, the runtime answers sparsely."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import jinja2
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from coreinfer.api import in_batches
from coreinfer.backends.base import Backend
from coreinfer.errors import UserError
from coreinfer.evaluation.continuations import Setting, sharing_a_prefill, widest
from coreinfer.evaluation.rules import Rule
from coreinfer.journal import Entry, Journal, key_of
from coreinfer.runtime.generation import Prefilled, continue_from, prefill
from coreinfer.runtime.sampling import SamplingParams
from coreinfer.runtime.scoring import score_choices
from coreinfer.selectors import Dense

MAX_GEN_TOKENS = 256  # lm-eval's default
UNKNOWN_LENGTH = 2048  # tokens, of models that do not say what they read

# lm-eval's names of generation options -> fields of SamplingParams.
_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
_IGNORED = {"do_sample", "until", "max_gen_toks"}

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class _Context:
    """A context that is read once, with everything that is asked of it: key -> continuation."""

    tokens: list[int]
    text: str
    wanted: dict[str, list[int]] = field(default_factory=dict)


# Answers what a batch of contexts is asked, under a setting: a dict of answers by key a context.
Compute = Callable[[Prefilled, Sequence[_Context], Setting], list[dict[str, Entry]]]


class HarnessModel(TemplateLM):  # type: ignore[misc]  # lm-eval is not typed
    """A loaded model under one or more rules, as lm-eval sees it.

    Each request is answered under every rule from one dense prefill; lm-eval is given those of
    `answering`, and finds the others there when it asks again on their behalf.

    Args:
        backend: the model.
        rules: ways to decode, by name; the first one answers until `answering` says otherwise.
        dense_scoring: score continuations densely, as the paper's code did, whatever the rule.
        batch_size: contexts computed together.
        seed: of sampling.
        answers: where answers are kept between runs; None keeps them in memory.
        on_progress: told how many of how many contexts are done.

    Raises:
        UserError: if a rule does not fit the model.
    """

    def __init__(
        self,
        backend: Backend,
        rules: Mapping[str, Rule],
        *,
        dense_scoring: bool = False,
        batch_size: int = 8,
        seed: int = 0,
        answers: Journal | None = None,
        on_progress: Progress = lambda _done, _total: None,
    ) -> None:
        super().__init__()
        for rule in rules.values():
            backend.check(rule.setting.selector, rule.setting.stand_in)
        self.engine = backend
        self.tokenizer = backend.tokenizer
        self.rules = dict(rules)
        self.answering = next(iter(self.rules))
        self.on_progress = on_progress
        # What lm-eval was given, and what was cut to the model's length; for others to clear.
        self.given: list[Entry] = []
        self.cut: set[str] = set()
        dense = Rule(Setting(Dense()))
        self._scoring = dict.fromkeys(self.rules, dense) if dense_scoring else self.rules
        self._batch_size = batch_size
        self._seed = seed
        self._answers = Journal() if answers is None else answers

    @property
    def eot_token_id(self) -> int:
        token = self.tokenizer.eos_token_id
        return int(next(iter(self.engine.eos_token_ids), 0) if token is None else token)

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without a context: BOS, or EOS where there is none."""
        token = self.tokenizer.bos_token_id
        return self.eot_token_id if token is None else int(token)

    @property
    def max_length(self) -> int:
        return self.engine.context_length or UNKNOWN_LENGTH

    @property
    def tokenizer_name(self) -> str:
        return self.engine.model_name.replace("/", "__")

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        if self.tokenizer.chat_template is None:
            raise UserError(f"{self.engine.model_name} has no chat template")
        try:
            text = self.tokenizer.apply_chat_template(
                chat_history,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
        except jinja2.TemplateError as error:
            raise UserError(f"the model's chat template refuses this task: {error}") from None
        return str(text)

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        if add_special_tokens is None:  # a chat template has written the BOS token already
            bos = self.tokenizer.bos_token
            add_special_tokens = bos is None or not string.startswith(bos)
        encoded = self.tokenizer(string, add_special_tokens=add_special_tokens, verbose=False)
        return list(encoded.input_ids)

    def loglikelihood(
        self, requests: list[Instance], disable_tqdm: bool = True
    ) -> list[tuple[float, bool]]:
        return list(super().loglikelihood(requests, disable_tqdm=True))

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        contexts: dict[tuple[int, ...], _Context] = {}
        keys = []
        for (text, _), tokens, continuation in requests:
            if not continuation:
                raise UserError(f"a continuation of {text[-40:]!r} has no token of its own")
            continuation = continuation[-self.max_length :]
            # The last token is not read; a prefill leaves room for one more.
            room = min(self.max_length - 1, self.max_length + 1 - len(continuation))
            kept = self._cut(tokens or [self.prefix_token_id], room)
            key = key_of("score", kept, continuation)
            context = contexts.setdefault(tuple(kept), _Context(kept, text))
            context.wanted[key] = continuation
            keys.append(key)
        self._fill([(list(contexts.values()), self._score)], self._scoring)
        answers = self._give(self._scoring, keys)
        return [(answer["logprob"], answer["greedy"]) for answer in answers]

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = True
    ) -> list[float]:
        windows, owners = [], []
        for owner, request in enumerate(requests):
            for pair in get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0], add_special_tokens=False),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            ):
                context, continuation = make_disjoint_window(pair)
                text = str(self.tokenizer.decode(context))
                windows.append(((text, ""), context, continuation))
                owners.append(owner)
        totals = [0.0] * len(requests)
        found = self._loglikelihood_tokens(windows) if windows else []
        for owner, (logprob, _) in zip(owners, found, strict=True):
            totals[owner] += logprob
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        groups: dict[SamplingParams, dict[tuple[int, ...], _Context]] = defaultdict(dict)
        keys = []
        times: Counter[str] = Counter()
        for request in requests:
            text, options = request.args[:2]
            params = self._sampling(options)
            room = self.max_length - params.max_new_tokens
            if room < 1:
                raise UserError(
                    f"the task asks for {params.max_new_tokens} tokens, "
                    f"{self.engine.model_name} reads {self.max_length} with the prompt"
                )
            tokens = self._cut(self.tok_encode(text) or [self.prefix_token_id], room)
            asked = key_of("generate", tokens, options)
            # Asked again, a sampled answer is another draw.
            params = replace(params, seed=self._seed + times[asked])
            times[asked] += 1
            key = key_of(asked, params.seed)
            context = groups[params].setdefault(tuple(tokens), _Context(tokens, text))
            context.wanted[key] = []
            keys.append(key)
        work = [
            (list(group.values()), partial(self._generate, params))
            for params, group in groups.items()
        ]
        self._fill(work, self.rules)
        return [answer["text"] for answer in self._give(self.rules, keys)]

    def _sampling(self, options: Mapping[str, Any]) -> SamplingParams:
        given = dict(normalize_gen_kwargs(dict(options), MAX_GEN_TOKENS))
        if unknown := given.keys() - _IGNORED - set(_SAMPLING):
            raise UserError(
                f"generation option {sorted(unknown)[0]!r} is not supported; there are "
                f"{', '.join(_SAMPLING)}"
            )
        stop = handle_stop_sequences(given["until"], eos=None)
        return SamplingParams(
            max_new_tokens=given["max_gen_toks"],
            stop=tuple(text for text in stop if text),
            **{name: given[name] for name in _SAMPLING if given.get(name) is not None},
        )

    def _cut(self, tokens: list[int], room: int) -> list[int]:
        """The end of a context that is longer than the model reads, as lm-eval does."""
        if len(tokens) <= room:
            return tokens
        self.cut.add(key_of(tokens))
        return tokens[-room:]

    def _give(self, rules: Mapping[str, Rule], keys: Sequence[str]) -> list[Entry]:
        digest = rules[self.answering].digest
        found = [self._answers[key_of(digest, key)] for key in keys]
        self.given += found
        return found

    def _fill(
        self, work: Sequence[tuple[list[_Context], Compute]], rules: Mapping[str, Rule]
    ) -> None:
        """Answer what has no answer yet, batch by batch; a batch is kept as soon as it is done.

        The batches do not depend on what is there, so a run that goes on where another one was
        interrupted computes what that one would have.
        """
        done, total = 0, sum(len(contexts) for contexts, _ in work)
        for contexts, compute in work:
            contexts.sort(key=lambda context: (-len(context.tokens), context.tokens))
            for batch in in_batches(contexts, self._batch_size):
                self._fill_batch(batch, compute, rules)
                done += len(batch)
                self.on_progress(done, total)

    def _fill_batch(
        self, batch: Sequence[_Context], compute: Compute, rules: Mapping[str, Rule]
    ) -> None:
        wanted = [key for context in batch for key in context.wanted]
        missing = {  # by digest, for rules may be equal
            rule.digest: rule.setting
            for rule in rules.values()
            if any(key_of(rule.digest, key) not in self._answers for key in wanted)
        }
        for group in sharing_a_prefill(missing):
            plan = widest(missing[digest] for digest in group)
            read = prefill(self.engine, [c.tokens for c in batch], plan, [c.text for c in batch])
            for digest in group:
                for row in compute(read.fork(), batch, missing[digest]):
                    self._answers.add({key_of(digest, key): found for key, found in row.items()})

    def _score(
        self, read: Prefilled, batch: Sequence[_Context], setting: Setting
    ) -> list[dict[str, Entry]]:
        wanted = [list(context.wanted.values()) for context in batch]
        scored = score_choices(self.engine, read, wanted, setting.selector, setting.stand_in)
        return [
            {
                key: {
                    "logprob": score.logprob,
                    "greedy": score.greedy,
                    "tokens": score.num_tokens,
                    "density": score.density,
                    "bytes_per_token": score.bytes_per_token,
                }
                for key, score in zip(context.wanted, scores, strict=True)
            }
            for context, scores in zip(batch, scored, strict=True)
        ]

    def _generate(
        self,
        params: SamplingParams,
        read: Prefilled,
        batch: Sequence[_Context],
        setting: Setting,
    ) -> list[dict[str, Entry]]:
        pieces = continue_from(self.engine, read, setting.selector, setting.stand_in, params)
        records = {piece.index: piece.record for piece in pieces if piece.record is not None}
        return [
            {
                key: {
                    "text": records[row].text,
                    "tokens": records[row].generated_tokens,
                    "density": records[row].density,
                    "bytes_per_token": records[row].bytes_per_token,
                }
                for key in context.wanted
            }
            for row, context in enumerate(batch)
        ]
