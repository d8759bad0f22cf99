"""The model type: lm-eval asks for texts, the runtime answers sparsely."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jinja2
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from coreinfer.api import in_batches
from coreinfer.backends.base import Backend
from coreinfer.errors import UserError
from coreinfer.evaluation.answers import Answer, Answers, key_of
from coreinfer.evaluation.continuations import Setting, widest
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
    wanted: dict[str, list[int]]


class HarnessModel(TemplateLM):
    """A loaded model under one or more settings, as lm-eval sees it.

    Each request is answered under every setting from one dense prefill; lm-eval is given those of
    `answering`, and finds the others there when it asks again on their behalf.

    Args:
        backend: the model.
        settings: ways to decode, by name; the first one answers until `answering` says otherwise.
        dense_scoring: score continuations densely, as the paper's code did, whatever the setting.
        batch_size: contexts computed together.
        seed: of sampling.
        answers: where answers are kept between runs; None keeps them in memory.
        on_progress: told how many of how many contexts are done.
    """

    def __init__(
        self,
        backend: Backend,
        settings: Mapping[str, Setting],
        *,
        dense_scoring: bool = False,
        batch_size: int = 8,
        seed: int = 0,
        answers: Mapping[str, Answers] | None = None,
        on_progress: Progress = lambda _done, _total: None,
    ) -> None:
        super().__init__()
        for setting in settings.values():
            backend.check(setting.selector, setting.stand_in)
        self.engine = backend
        self.tokenizer = backend.tokenizer
        self.settings = dict(settings)
        self.answering = next(iter(self.settings))
        self.given: list[Answer] = []  # what lm-eval was given, until somebody clears it
        self._scoring = {
            name: Setting(Dense()) if dense_scoring else setting
            for name, setting in self.settings.items()
        }
        self._batch_size = batch_size
        self._seed = seed
        self._answers = answers or {name: Answers() for name in self.settings}
        self._on_progress = on_progress

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
            # Cut on the left to what the model reads; the last token is not read.
            room = max(1, self.max_length + 1 - len(continuation))
            tokens = (tokens or [self.prefix_token_id])[-room:]
            continuation = continuation[-self.max_length :]
            key = key_of("score", tokens, continuation)
            context = contexts.setdefault(tuple(tokens), _Context(tokens, text, {}))
            context.wanted[key] = continuation
            keys.append(key)
        self._fill(list(contexts.values()), self._scoring, self._score)
        answers = self._give(keys)
        return [(answer["logprob"], answer["greedy"]) for answer in answers]

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = True
    ) -> list[float]:
        windows, owners = [], []
        for owner, request in enumerate(requests):
            for pair in get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
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
        groups: dict[SamplingParams, dict[tuple[int, ...], _Context]] = {}
        keys = []
        times: Counter[str] = Counter()
        for request in requests:
            text, options = request.args[:2]
            params = self._sampling(options)
            room = max(1, self.max_length - params.max_new_tokens)
            tokens = (self.tok_encode(text) or [self.prefix_token_id])[-room:]
            asked = key_of("generate", tokens, options)
            # Asked again, a sampled answer is another draw.
            params = self._sampling(options, times[asked])
            key = key_of("generate", tokens, options, params.seed)
            times[asked] += 1
            context = groups.setdefault(params, {}).setdefault(
                tuple(tokens), _Context(tokens, text, {})
            )
            context.wanted[key] = []
            keys.append(key)
        total = sum(len(group) for group in groups.values())
        done = 0
        for params, group in groups.items():

            def generate(
                read: Prefilled, batch: Sequence[_Context], setting: Setting
            ) -> list[dict[str, Answer]]:
                return self._generate(read, batch, setting, params)  # noqa: B023

            self._fill(list(group.values()), self.settings, generate, done, total)
            done += len(group)
        return [answer["text"] for answer in self._give(keys)]

    def _sampling(self, options: Mapping[str, Any], repeat: int = 0) -> SamplingParams:
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
            seed=self._seed + repeat,
            **{name: given[name] for name in _SAMPLING if given.get(name) is not None},
        )

    def _give(self, keys: Sequence[str]) -> list[Answer]:
        found = [self._answers[self.answering][key] for key in keys]
        self.given += found
        return found

    def _fill(
        self,
        contexts: list[_Context],
        settings: Mapping[str, Setting],
        compute: Callable[[Prefilled, Sequence[_Context], Setting], list[dict[str, Answer]]],
        done: int = 0,
        total: int | None = None,
    ) -> None:
        """Answer what has no answer yet, batch by batch; a batch is kept as soon as it is done.

        The batches do not depend on what is there, so a run that goes on where another one was
        interrupted computes what that one would have.
        """
        contexts.sort(key=lambda context: (-len(context.tokens), context.tokens))
        total = len(contexts) if total is None else total
        for batch in in_batches(contexts, self._batch_size):
            missing = {
                name: setting
                for name, setting in settings.items()
                if any(key not in self._answers[name] for c in batch for key in c.wanted)
            }
            for names in sharing_a_prefill(missing):
                plan = widest(missing[name] for name in names)
                tokens, texts = [c.tokens for c in batch], [c.text for c in batch]
                read = prefill(self.engine, tokens, plan, texts)
                computed: dict[str, dict[str, Answer]] = {}  # settings may be equal
                for name in names:
                    same = json.dumps(described(missing[name]), sort_keys=True)
                    if same not in computed:
                        rows = compute(read.fork(), batch, missing[name])
                        computed[same] = {k: v for row in rows for k, v in row.items()}
                    self._answers[name].add(computed[same])
            done += len(batch)
            self._on_progress(done, total)

    def _score(
        self, read: Prefilled, batch: Sequence[_Context], setting: Setting
    ) -> list[dict[str, Answer]]:
        wanted = [list(context.wanted.values()) for context in batch]
        scored = score_choices(read, wanted, setting.selector, setting.stand_in)
        cost = self.engine.cost
        return [
            {
                key: {
                    "logprob": score.logprob,
                    "greedy": score.greedy,
                    "density": score.density,
                    "bytes_per_token": cost.sparse(choice.core_set, choice.stand_in_bytes),
                }
                for key, score in zip(context.wanted, scores, strict=True)
            }
            for context, scores, choice in zip(batch, scored.scores, scored.selected, strict=True)
        ]

    def _generate(
        self,
        read: Prefilled,
        batch: Sequence[_Context],
        setting: Setting,
        params: SamplingParams,
    ) -> list[dict[str, Answer]]:
        pieces = continue_from(self.engine, read, setting.selector, setting.stand_in, params)
        records = {piece.index: piece.record for piece in pieces if piece.record is not None}
        return [
            {
                key: {
                    "text": records[row].text,
                    "density": records[row].density,
                    "bytes_per_token": records[row].bytes_per_token,
                }
                for key in context.wanted
            }
            for row, context in enumerate(batch)
        ]


def described(setting: Setting) -> dict[str, Any]:
    """A setting as plain JSON."""
    stand_in = setting.stand_in
    return {
        "selector": setting.selector.describe(),
        "stand_in": None if stand_in is None else stand_in.describe(),
    }


def sharing_a_prefill(settings: Mapping[str, Setting]) -> Iterator[list[str]]:
    """The names of settings that one recording serves, group by group."""
    groups: list[list[str]] = []
    for name, setting in settings.items():
        for group in groups:
            try:
                widest([*(settings[other] for other in group), setting])
            except UserError:
                continue
            group.append(name)
            break
        else:
            groups.append([name])
    yield from groups
