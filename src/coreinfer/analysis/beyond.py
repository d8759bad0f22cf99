"""Question 6: core neurons outside language models: an encoder, a convolution, a recurrence."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from coreinfer.analysis.digits import Convolutional, Digits, Recurrent, digits, train
from coreinfer.analysis.intervals import mean
from coreinfer.analysis.materials import Materials
from coreinfer.analysis.modules import Tap, core_units, keeping, recording
from coreinfer.analysis.question import Answer
from coreinfer.analysis.sections import Cell, Chart, Figure, Table
from coreinfer.analysis.settings import Settings
from coreinfer.core.measures import mean_overlap
from coreinfer.core.statistics import LayerStatistics
from coreinfer.errors import UserError
from coreinfer.evaluation.overlap import random_overlap
from coreinfer.semantics.encoders import SentenceEncoder

EPOCHS = 25
MOST_INPUTS = 120  # images or texts that are measured
READ = 5  # rows of a digit that a recurrence reads before its units are chosen
MOST_WORDS = 60
OWN, GROUP, STATIC, RANDOM = "own input", "its group", "all inputs", "random"
BEGINNING = "its beginning"
METHOD = (
    "Units of any torch module are recorded by hooks into the same statistics, an input each: the "
    "MLP neurons of all-MiniLM-L6-v2 (groups: the kinds of text given), the channels and hidden "
    "units of a small convolutional network, the state of a GRU cell, both trained on scikit-"
    "learn's digits (groups: the ten digits). Stability: overlap of the core units of two inputs "
    "of a group, of different groups, and, for what reads in order, of an input's beginning and "
    "end. Cost: all units but the kept ones are set to zero, chosen from the same input (which "
    "saves nothing, it bounds what a set can do), from the sums of its group or of all inputs that "
    "are not measured, at random, and for the GRU from the first rows of the image, with the other "
    "rows read by those alone, as CoreInfer decodes. Kept as before: the share of the measured "
    "inputs on which the network gives the same class as whole, or, of the encoder, the cosine of "
    "the vector with the whole one's."
)

Statistics = Mapping[str, LayerStatistics]


@dataclass(frozen=True)
class Network:
    """A network to be asked.

    Attributes:
        taps: its units.
        run: inputs -> outputs, a row each.
        inputs: what is measured, one entry an input; `group` of each.
        learnt: statistics of other inputs, by group.
        likeness: of an output with the whole network's, 0 to 1, higher is better.
        by: how units are ranked.
    """

    name: str
    taps: Mapping[str, Tap]
    run: Callable[[Any], Tensor]
    inputs: Sequence[Any]
    group: Sequence[str]
    learnt: Mapping[str, Statistics]
    likeness: Callable[[Tensor, Tensor], float]


class Beyond:
    """Stability and cost of core units in three networks that are no language models."""

    name: ClassVar[str] = "beyond"
    title: ClassVar[str] = "Core neurons outside language models"
    needs_model: ClassVar[bool] = False
    needs_sources: ClassVar[int] = 0

    def windows(self, settings: Settings) -> Sequence[tuple[int, int]]:
        return []

    def ask(self, materials: Materials) -> Answer:
        s = materials.settings
        data = digits(s.seed)
        findings: list[str] = []
        networks = [convolutional(data, s.seed, findings), recurrent(data, s.seed, findings)]
        if len(materials.sources) > 1:
            networks.append(sentence_encoder(materials))
        else:
            findings.append("The encoder was not asked: that needs texts of two kinds.")
        shared: list[dict[str, Cell]] = []
        costs: list[dict[str, Cell]] = []
        for network in networks:
            materials.on_progress(f"beyond: {network.name}")
            own = [statistics_of(network, one) for one in network.inputs]
            shared += overlaps(network, own, s.keep)
            costs += cost(network, own, s.keeps, s.seed)
        with torch.no_grad():
            gru = networks[1]
            shared += beginning_and_end(gru, s.keep)
            costs += from_the_beginning(gru, s.keeps)
        caption = f"Overlap (Jaccard) of core units, keep {s.keep:g}, mean over the places."
        stable = Table.of("stability", caption, shared)
        kept = Table.of("cost", "What is kept of the output, by how the units are chosen.", costs)
        findings += told(shared, costs, s.keep)
        return Answer(
            METHOD,
            findings,
            [
                Figure(stable, Chart("bars", x="network", y="overlap", series="between",
                                     low="overlap_low", high="overlap_high", y_label="Jaccard",
                                     reference=("random sets", random_overlap(s.keep)))),
                Figure(kept, Chart("lines", x="keep", y="kept", series="units from",
                                   panel="network and ranking", low="kept_low", high="kept_high",
                                   y_label="same class, or cosine")),
            ],
        )  # fmt: skip


def statistics_of(network: Network, one: Any) -> Statistics:
    with recording(network.taps) as recorded, torch.no_grad():
        network.run(one)
    return {name: recorded.total(name) for name in network.taps}


def chosen(statistics: Statistics, keep: float, by: Any) -> dict[str, Tensor]:
    return {name: core_units(one, keep, by) for name, one in statistics.items()}


def shared_units(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> float:
    """Mean overlap over the taps."""
    return mean_overlap(dict(enumerate(a.values())), dict(enumerate(b.values())))


def overlaps(network: Network, own: Sequence[Statistics], keep: float) -> list[dict[str, Cell]]:
    """Between two inputs of one group, and of two; each input is once the first of a pair."""
    sets = [chosen(one, keep, "counts") for one in own]
    values: dict[str, list[float]] = {"two of a group": [], "two of different groups": []}
    for i, group in enumerate(network.group):
        for kind, alike in (("two of a group", True), ("two of different groups", False)):
            partners = [
                j for j, other in enumerate(network.group) if j != i and (other == group) == alike
            ]
            if partners:
                j = partners[i % len(partners)]
                values[kind].append(shared_units(sets[i], sets[j]))
    return [
        {"network": network.name, "between": kind, **mean(found).cells("overlap")}
        for kind, found in values.items()
        if found
    ]


def cost(
    network: Network, own: Sequence[Statistics], keeps: Sequence[float], seed: int
) -> list[dict[str, Cell]]:
    """What is left of the outputs with some units alone, by how they are chosen."""
    with torch.no_grad():
        whole = [network.run(one) for one in network.inputs]
    everything = total(network.learnt.values())
    rows: list[dict[str, Cell]] = []
    for by in ("counts", "l2"):
        for source in (OWN, GROUP, STATIC, RANDOM):
            for keep in keeps:
                kept: list[float] = []
                for i, one in enumerate(network.inputs):
                    statistics = {
                        OWN: own[i],
                        GROUP: network.learnt[network.group[i]],
                        STATIC: everything,
                        RANDOM: drawn(everything, seed),
                    }[source]
                    units = chosen(statistics, keep, by)
                    with keeping(network.taps, units), torch.no_grad():
                        kept.append(network.likeness(network.run(one), whole[i]))
                rows.append(_cost_row(network, by, source, keep, kept))
    return rows


def total(parts: Any) -> Statistics:
    """The sum of the statistics of several groups."""
    first, *others = parts
    summed = dict(first)
    for part in others:
        summed = {name: summed[name] + part[name] for name in summed}
    return summed


def drawn(like: Statistics, seed: int) -> Statistics:
    """Statistics of chance, the same for every input."""
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for name, one in like.items():
        chance = LayerStatistics.zeros(one.num_neurons, one.num_neurons)
        draw = torch.rand(one.num_neurons, generator=generator, dtype=torch.float64)
        chance.positive_sum = chance.square_sum = draw
        made[name] = chance
    return made


def convolutional(data: Digits, seed: int, findings: list[str]) -> Network:
    network = seeded(Convolutional, seed)
    right = train(network, data, seed, EPOCHS)
    findings.append(f"The convolutional network tells {right:.1%} of the test digits right.")
    taps = {
        "first": Tap(network.first, axis=1),
        "second": Tap(network.second, axis=1),
        "hidden": Tap(network.hidden),
    }
    return _digit_network("convolutional", network, taps, data)


def recurrent(data: Digits, seed: int, findings: list[str]) -> Network:
    network = seeded(Recurrent, seed)
    right = train(network, data, seed, EPOCHS)
    findings.append(f"The recurrent network tells {right:.1%} of the test digits right.")
    return _digit_network("recurrent", network, {"state": Tap(network.cell)}, data)


def seeded(make: Callable[[], nn.Module], seed: int) -> Any:
    """A network with weights drawn from a seed, the global generator left as it was."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return make()


def _digit_network(name: str, network: nn.Module, taps: Mapping[str, Tap], data: Digits) -> Network:
    images, labels = data.train
    learnt: dict[str, Statistics] = {}
    for label in labels.unique().tolist():
        with recording(taps) as recorded, torch.no_grad():
            network(images[labels == label])
        learnt[str(label)] = {tap: recorded.total(tap) for tap in taps}
    test, group = data.test[0][:MOST_INPUTS], data.test[1][:MOST_INPUTS]
    return Network(
        name, taps, network, [image.unsqueeze(0) for image in test],
        [str(label) for label in group.tolist()], learnt, same_class,
    )  # fmt: skip


def same_class(output: Tensor, whole: Tensor) -> float:
    return float((output.argmax(dim=-1) == whole.argmax(dim=-1)).double().mean())


def beginning_and_end(network: Network, keep: float) -> list[dict[str, Cell]]:
    """Overlap of the units of an image's first rows with those of its last."""
    recurrent_ = _recurrent(network)
    found = []
    for image in network.inputs:
        with recording(network.taps) as first:
            state = recurrent_.read(image[:, :READ])
        with recording(network.taps) as last:
            recurrent_.read(image[:, READ:], state)
        sets = [core_units(part.total("state"), keep) for part in (first, last)]
        found.append(mean_overlap({0: sets[0]}, {0: sets[1]}))
    return [
        {"network": network.name, "between": "beginning and end", **mean(found).cells("overlap")}
    ]


def from_the_beginning(network: Network, keeps: Sequence[float]) -> list[dict[str, Cell]]:
    """The last rows read with the units of the first rows alone: prefill, select, decode."""
    recurrent_ = _recurrent(network)
    rows = []
    for by in ("counts", "l2"):
        for keep in keeps:
            kept = []
            for image in network.inputs:
                with recording(network.taps) as recorded:
                    state = recurrent_.read(image[:, :READ])
                units = chosen({"state": recorded.total("state")}, keep, by)
                with keeping(network.taps, units):
                    output = recurrent_.head(recurrent_.read(image[:, READ:], state))
                kept.append(same_class(output, network.run(image)))
            rows.append(_cost_row(network, by, BEGINNING, keep, kept))
    return rows


def _recurrent(network: Network) -> Recurrent:
    assert isinstance(network.run, Recurrent)
    return network.run


def _cost_row(
    network: Network, by: str, source: str, keep: float, kept: Sequence[float]
) -> dict[str, Cell]:
    return {
        "network": network.name,
        "ranked by": by,
        "network and ranking": f"{network.name}, by {by}",
        "units from": source,
        "keep": keep,
        **mean(kept).cells("kept"),
        "inputs": len(kept),
    }


def sentence_encoder(materials: Materials) -> Network:
    """all-MiniLM-L6-v2 on paragraphs of each source, its groups."""
    encoder = SentenceEncoder()
    model = encoder.network
    taps = {
        name: Tap(module)
        for name, module in model.named_modules()
        if name.endswith(".intermediate")  # of every BERT layer, after its activation function
    }
    if not taps:
        raise UserError(f"the sentence encoder {encoder.model!r} has no layers of BERT's kind")

    def run(text: str) -> Tensor:
        vector: Tensor = model.encode([text], convert_to_tensor=True, show_progress_bar=False)
        return vector

    count = materials.settings.windows
    inputs: list[str] = []
    group: list[str] = []
    learnt: dict[str, Statistics] = {}
    for source in materials.sources:
        measured = _beginnings(source.half(0).paragraphs(), count)
        others = _beginnings(source.half(1).paragraphs(), 3 * count)
        inputs += measured
        group += [source.name] * len(measured)
        parts = []
        for text in others:
            with recording(taps) as recorded, torch.no_grad():
                run(text)
            parts.append({tap: recorded.total(tap) for tap in taps})
        learnt[source.name] = total(parts)
    return Network("MiniLM", taps, run, inputs, group, learnt, cosine)


def cosine(output: Tensor, whole: Tensor) -> float:
    return float(nn.functional.cosine_similarity(output, whole, dim=-1).mean())


def _beginnings(texts: Sequence[str], count: int) -> list[str]:
    """Evenly chosen texts, their first words."""
    count = min(count, len(texts))
    chosen_ = [texts[i * len(texts) // count] for i in range(count)]
    return [" ".join(text.split()[:MOST_WORDS]) for text in chosen_]


def told(
    shared: Sequence[Mapping[str, Cell]], costs: Sequence[Mapping[str, Cell]], keep: float
) -> list[str]:
    """The numbers nearest to `keep`, in words."""
    lines = [
        f"{row['network']}: overlap of {row['between']} {float(row['overlap'] or 0):.2f} (random "
        f"sets {random_overlap(keep):.2f})."
        for row in shared
    ]
    near = min((float(row["keep"] or 0) for row in costs), key=lambda value: abs(value - keep))
    for name in dict.fromkeys(row["network and ranking"] for row in costs):
        parts = [
            f"{row['units from']} {float(row['kept'] or 0):.2f}"
            for row in costs
            if row["network and ranking"] == name and row["keep"] == near
        ]
        lines.append(f"{name}, keep {near:g}, kept of the output: {', '.join(parts)}.")
    return lines
