"""Choosing, fitting and packing while the prompt is read: a layer at a time, as it is passed."""

from __future__ import annotations

from torch import Tensor

from coreinfer.backends.choose import (
    Chosen,
    SmallLayer,
    SparseLayer,
    check,
    least_activations,
    make_sparse,
    others,
    put_together,
    skipped_part,
    stays_whole,
)
from coreinfer.backends.native.products import Products
from coreinfer.backends.native.steps import PackedLayer, Stepper
from coreinfer.backends.native.view import NativeView
from coreinfer.recording import Intent, PromptRecorder, RecordingPlan
from coreinfer.selectors import Selection, Selector
from coreinfer.selectors.base import LayerSource
from coreinfer.standins import StandIn


class Ahead:
    """What a rule and a stand-in make of one prompt, worked out in the pass that reads it.

    Once a layer's activations h [N, D] are recorded, a rule that ranks layer by layer can choose
    its core neurons K. The down projection is then multiplied in two parts, of K and of the rest,
    which takes no more than the whole: the second one is the dropped part of every token, which
    the stand-in is fitted on.
    """

    def __init__(
        self,
        view: NativeView,
        products: Products,
        stepper: Stepper,
        recorder: PromptRecorder,
        intent: Intent,
        source: LayerSource,
    ) -> None:
        self.intent = intent
        self._view = view
        self._products = products
        self._stepper = stepper
        self._recorder = recorder
        self._source = source
        self._kept: dict[int, Tensor] = {}
        self._sparse: dict[int, SparseLayer[list[PackedLayer]]] = {}
        self._layers = 0  # passed so far

    @classmethod
    def of(
        cls, view: NativeView, products: Products, stepper: Stepper, recorder: PromptRecorder
    ) -> Ahead | None:
        """Of what the recorder's plan says will be asked for; None where that takes more.

        Raises:
            UserError: if it does not fit the model.
        """
        intent = recorder.plan.intent
        if intent is None:
            return None
        check(view, intent.selector, intent.stand_in)
        source = intent.selector.by_layer(view.num_neurons)
        needed = RecordingPlan.of(intent.selector, intent.stand_in)
        if source is None or not recorder.plan.covers(needed):
            return None
        return cls(view, products, stepper, recorder, intent, source)

    def serves(self, selector: Selector, stand_in: StandIn | None) -> bool:
        """Whether this was worked out, in every layer."""
        complete = self._layers == len(self._view.num_neurons)
        return complete and self.intent == Intent(selector, stand_in)

    def pass_layer(self, layer: int, h: Tensor) -> Tensor | None:
        """Choose, fit and pack a layer whose tokens h [N, D], all of the prompt, are recorded.

        Returns:
            h W_down^T [N, d] float32, where the layer was multiplied in parts.
        """
        own = self._recorder.layer_statistics(layer)
        if self._layers != layer or not own.is_finite:
            return None  # asking for a choice then says what is wrong
        self._layers += 1
        selector, stand_in = self.intent.selector, self.intent.stand_in
        size = own.num_neurons
        kept = selector.choose(layer, self._source(layer, own), self._view.column_norms)
        if kept is None:
            return None
        self._kept[layer] = kept
        if stays_whole(layer, kept, size, selector):
            return None
        terms, product = None, None
        least = least_activations(layer, [kept], [self._recorder], selector)
        if stand_in is not None and kept.numel() < size:
            down, rest = self._view.down(layer), others(kept, size)
            product, dropped = self._products.down_in_parts(
                h, down.records, down.size, [kept.long(), rest]
            )
            own_least = None if least is None else least[0]
            skipped = skipped_part(stand_in, layer, self._recorder, down, kept, own_least)
            sample = self._recorder.sample(layer)
            terms = [stand_in.fit(layer, sample, down, rest, dropped, skipped)]
            product += dropped
        small = SmallLayer(layer, [kept], terms, least)
        self._sparse[layer] = make_sparse(self._view, small, self._stepper.pack_layer)
        return product

    def chosen(self) -> Chosen[list[PackedLayer]]:
        """The outcome, once complete."""
        selection = Selection(dict(self._kept))
        return put_together(self._view, self.intent.selector, [selection], self._sparse)
