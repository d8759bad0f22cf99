"""Tells lm-evaluation-harness of the model type `coreinfer`, when and only when it is used.

lm-eval finds models in its own table alone and asks no entry points, so this waits for that table
to be imported and adds a line to it. `coreinfer-lm-eval.pth`, installed beside this file, imports
it whenever Python starts; it imports nothing itself, and does nothing where lm-eval is not used.
"""

import sys


class _Announcer:
    """A finder that finds nothing: it learns from the search that the table is about to load."""

    def find_spec(self, name, path=None, target=None):
        if name == "lm_eval.models":
            sys.meta_path.remove(self)
            try:
                from lm_eval.api.registry import model_registry

                model_registry.register("coreinfer", target="coreinfer.cli.lm_eval_model:CoreInfer")
            except Exception:  # an lm-eval of another design works on, without this line
                pass


sys.meta_path.insert(0, _Announcer())
