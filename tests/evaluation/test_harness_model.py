"""lm-eval's model type: equal to plain computations through transformers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance

from coreinfer.backends.hf.session import HfBackend
from coreinfer.errors import UserError
from coreinfer.evaluation.continuations import Setting
from coreinfer.evaluation.harness.model import HarnessModel
from coreinfer.evaluation.rules import Rule
from coreinfer.journal import Journal
from coreinfer.runtime.scoring import Pair, score
from coreinfer.selectors import Dense, Impact, Oracle, Random, Stability
from coreinfer.standins import Linear
from tests.tiny import BOS, EOS, PAD, tiny_backend, tiny_model, tiny_tokenizer

RULES = {
    "dense": Rule(Setting(Dense())),
    "stability": Rule(Setting(Stability(beta=0.3))),
    "other alpha": Rule(Setting(Stability(beta=0.3, alpha=0.1))),
    "impact+linear": Rule(Setting(Impact(beta=0.3), Linear(rank=2))),
    "random": Rule(Setting(Random(beta=0.3))),
    "oracle": Rule(Setting(Oracle(beta=0.3))),
}
PAIRS = [
    ("the first context is a longer one", " and goes on"),
    ("the first context is a longer one", " or stops, perhaps, after a while"),
    ("two ", "spaces at the seam"),
    ("x", "y"),
    ("", "no context at all"),
]


def asked(kind: str, *arguments: Any) -> list[Instance]:
    return [Instance(kind, {}, one, i) for i, one in enumerate(arguments)]


def plain_logprob(model: Any, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    """One forward pass over everything, one pair at a time."""
    with torch.no_grad():
        logits = model(torch.tensor([context + continuation])).logits[0].double()
    total, greedy = 0.0, True
    for i, token in enumerate(continuation):
        row = logits[len(context) + i - 1]
        total += float(row[token] - row.logsumexp(dim=0))
        greedy = greedy and int(row.argmax()) == token
    return total, greedy


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_dense_log_likelihoods_are_those_of_transformers(batch_size: int) -> None:
    backend = tiny_backend()
    model = HarnessModel(backend, {"dense": RULES["dense"]}, batch_size=batch_size)
    found = model.loglikelihood(asked("loglikelihood", *PAIRS))
    for (context, continuation), (logprob, greedy) in zip(PAIRS, found, strict=True):
        ids = [list(text.encode()) for text in (context.rstrip(" "), continuation)]
        if context.endswith(" "):
            ids[1] = list(b" ") + ids[1]
        first = list(tiny_tokenizer()(context.rstrip(" ") or "<bos>").input_ids)
        rest = list(tiny_tokenizer()(ids[1] and bytes(ids[1]).decode()).input_ids)
        wanted = plain_logprob(tiny_model(), first, rest)
        assert logprob == pytest.approx(wanted[0], rel=1e-5)
        assert greedy == wanted[1]


def test_the_argmax_path_is_called_greedy() -> None:
    backend = tiny_backend()
    context = backend.tokenizer("where to").input_ids
    best = tiny_model().generate(
        torch.tensor([context]), max_new_tokens=4, do_sample=False, eos_token_id=None
    )[0, len(context) :]
    model = HarnessModel(backend, {"dense": RULES["dense"]})
    ((_, greedy), (_, other)) = model._loglikelihood_tokens(
        [(("", ""), context, best.tolist()), (("", ""), context, [*best.tolist()[:-1], 7])]
    )
    assert greedy
    assert not other


@pytest.mark.parametrize("name", RULES)
def test_sparse_log_likelihoods_are_those_of_the_runtime(name: str) -> None:
    """Each pair by itself through `score`; the harness answers several rules from one prefill."""
    backend = tiny_backend()
    model = HarnessModel(backend, RULES, batch_size=3)
    model.answering = name
    found = model.loglikelihood(asked("loglikelihood", *PAIRS[:4]))
    setting = RULES[name].setting
    for pair, (logprob, greedy) in zip(PAIRS[:4], found, strict=True):
        (wanted,) = score(backend, [Pair.of(backend, *pair)], setting.selector, setting.stand_in)
        assert logprob == pytest.approx(wanted.logprob, rel=1e-4)
        assert greedy == wanted.greedy
    assert {answer["density"] for answer in model.given} == {1.0 if name == "dense" else 14 / 48}


def test_rules_differ_and_dense_scoring_makes_them_one() -> None:
    totals = {}
    for dense_scoring in (False, True):
        model = HarnessModel(tiny_backend(), RULES, dense_scoring=dense_scoring)
        for name in RULES:
            model.answering = name
            answers = model.loglikelihood(asked("loglikelihood", *PAIRS))
            totals[dense_scoring, name] = sum(logprob for logprob, _ in answers)
    assert len({totals[False, name] for name in RULES}) == len(RULES)
    assert {totals[True, name] for name in RULES} == {totals[False, "dense"]}


def test_the_first_token_is_the_prefills() -> None:
    """As in generation: a continuation of one token is scored densely under every rule."""
    model = HarnessModel(tiny_backend(), RULES)
    found = set()
    for name in RULES:
        model.answering = name
        ((logprob, _),) = model.loglikelihood(asked("loglikelihood", ("some context", "y")))
        found.add(round(logprob, 4))
    assert len(found) == 1


@pytest.mark.parametrize("until", [[], ["e", "o"]])
def test_dense_generation_is_transformers_own(until: list[str]) -> None:
    backend = tiny_backend()
    texts = ["one text", "another, longer text", "a third one, the longest of all of them"]
    options = {"until": until, "max_gen_toks": 12, "do_sample": False}
    model = HarnessModel(backend, {"dense": RULES["dense"]}, batch_size=2)
    found = model.generate_until(asked("generate_until", *((text, options) for text in texts)))
    for text, answer in zip(texts, found, strict=True):
        prompt = torch.tensor([backend.tokenizer(text).input_ids])
        new = tiny_model().generate(prompt, max_new_tokens=12, do_sample=False, pad_token_id=PAD)
        wanted = backend.tokenizer.decode(new[0, prompt.shape[1] :], skip_special_tokens=True)
        for stop in until:
            wanted = wanted.split(stop)[0]
        assert answer == wanted
    assert any(found)


def test_generation_does_not_depend_on_the_batch_and_rules_differ() -> None:
    texts = ["one text", "another, longer text", "one text", "the end"]
    options = {"until": [], "max_gen_toks": 16}
    found = {}
    for batch_size in (1, 4):
        model = HarnessModel(tiny_backend(), RULES, batch_size=batch_size)
        for name in ("dense", "random"):
            model.answering = name
            requests = asked("generate_until", *((text, options) for text in texts))
            found[batch_size, name] = model.generate_until(requests)
    assert found[1, "dense"] == found[4, "dense"]
    assert found[1, "random"] == found[4, "random"]
    assert found[1, "random"] != found[1, "dense"]
    assert found[1, "dense"][0] == found[1, "dense"][2]


def test_sampled_answers_that_are_asked_again_are_other_draws() -> None:
    options = {"until": [], "max_gen_toks": 8, "do_sample": True, "temperature": 1.0}
    requests = asked("generate_until", *[("one text", options)] * 3)
    first = HarnessModel(tiny_backend(), RULES).generate_until(requests)
    again = HarnessModel(tiny_backend(), RULES).generate_until(requests)
    other = HarnessModel(tiny_backend(), RULES, seed=9).generate_until(requests)
    assert len(set(first)) == 3
    assert first == again
    assert set(first).isdisjoint(other)


def test_an_unknown_generation_option_is_refused() -> None:
    model = HarnessModel(tiny_backend(), RULES)
    requests = asked("generate_until", ("text", {"until": [], "num_beams": 4}))
    with pytest.raises(UserError, match=r"'num_beams' is not supported; there are temperature"):
        model.generate_until(requests)


def test_rolling_log_likelihood_is_the_whole_texts() -> None:
    text = "a text that is scored from its first to its last token. " * 3
    model = HarnessModel(tiny_backend(), {"dense": RULES["dense"]})
    (found,) = model.loglikelihood_rolling(asked("loglikelihood_rolling", (text,)))
    ids = list(tiny_tokenizer()(text).input_ids)
    assert found == pytest.approx(plain_logprob(tiny_model(), [BOS], ids)[0], rel=1e-5)


def test_a_text_longer_than_the_model_reads_is_scored_in_windows() -> None:
    backend = HfBackend(tiny_model(max_position_embeddings=20), tiny_tokenizer(), "short")
    text = "more than twenty tokens, a byte each"
    (found,) = HarnessModel(backend, {"dense": RULES["dense"]}).loglikelihood_rolling(
        asked("loglikelihood_rolling", (text,))
    )
    ids = list(tiny_tokenizer()(text).input_ids)
    model = tiny_model(max_position_embeddings=20)
    wanted = plain_logprob(model, [BOS], ids[:20])[0]
    rest = len(ids) - 20  # the last window is full, what it scores is new
    wanted += plain_logprob(model, ids[-21:-rest], ids[-rest:])[0]
    assert found == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("room", [1, 2, 5])
def test_a_long_context_is_cut_on_the_left(room: int) -> None:
    backend = HfBackend(tiny_model(max_position_embeddings=20), tiny_tokenizer(), "short")
    model = HarnessModel(backend, {"dense": RULES["dense"], "random": RULES["random"]})
    context, continuation = "a context of more than twenty tokens", "abcdefgh"[:room]
    ((logprob, _),) = model.loglikelihood(asked("loglikelihood", (context, continuation)))
    kept = list(tiny_tokenizer()(context).input_ids)[-min(19, 21 - room) :]
    ids = list(tiny_tokenizer()(continuation).input_ids)
    wanted, _ = plain_logprob(tiny_model(max_position_embeddings=20), kept, ids)
    assert logprob == pytest.approx(wanted, rel=1e-5)
    assert len(model.cut) == 1


def test_a_long_prompt_leaves_room_for_the_answer() -> None:
    backend = HfBackend(tiny_model(max_position_embeddings=20), tiny_tokenizer(), "short")
    model = HarnessModel(backend, {"dense": RULES["dense"]})
    prompt = "a prompt of more than twenty tokens"
    ask = {"until": [], "max_gen_toks": 6}
    (found,) = model.generate_until(asked("generate_until", (prompt, ask)))
    (same,) = model.generate_until(asked("generate_until", (prompt[-14:], ask)))
    assert found == same
    with pytest.raises(UserError, match="asks for 20 tokens, short reads 20 with the prompt"):
        model.generate_until(asked("generate_until", (prompt, {**ask, "max_gen_toks": 20})))


def test_what_is_known_is_not_computed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = Journal()
    requests = asked("loglikelihood", *PAIRS)
    dense = {"dense": RULES["dense"]}
    first = HarnessModel(tiny_backend(), dense, answers=answers).loglikelihood(requests)
    monkeypatch.setattr(HfBackend, "start", lambda *_: pytest.fail("nothing is to be computed"))
    assert HarnessModel(tiny_backend(), dense, answers=answers).loglikelihood(requests) == first


def test_a_chat_prompt_has_one_beginning() -> None:
    model = HarnessModel(tiny_backend(chat=True), {"dense": RULES["dense"]})
    prompt = model.apply_chat_template([{"role": "user", "content": "hello"}])
    assert prompt == "<bos>user: hello<eos><bos>assistant: "
    assert model.tok_encode(prompt)[0] == BOS
    assert model.tok_encode(prompt).count(EOS) == 1
    with pytest.raises(UserError, match="has no chat template"):
        HarnessModel(tiny_backend(), RULES).apply_chat_template([])


def test_a_rule_that_does_not_fit_is_refused_before_any_work() -> None:
    with pytest.raises(UserError, match="dense layer 9 is outside the model"):
        HarnessModel(tiny_backend(), {"x": Rule(Setting(Impact(dense_layers=(9,))))})


def test_progress_is_told_batch_by_batch() -> None:
    told: list[tuple[int, int]] = []
    model = HarnessModel(
        tiny_backend(), RULES, batch_size=2, on_progress=lambda *step: told.append(step)
    )
    model.loglikelihood(asked("loglikelihood", *PAIRS))
    assert told == [(2, 4), (4, 4)]  # five pairs, four contexts
