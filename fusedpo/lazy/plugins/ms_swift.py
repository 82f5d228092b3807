"""ms-swift's DPO, CPO, ORPO, KTO and GRPO without logits, as one of its plugins:

    PLUGIN=$(python -c "import fusedpo.lazy as lazy; print(lazy.__path__[0])")/plugins/ms_swift.py
    swift rlhf --rlhf_type dpo ... --external_plugins $PLUGIN

Its trainers go on as they are, on lazy logits (see ``fusedpo.lazy_logits``). So they do under
``fusedpo run swift rlhf ...``, which takes its options. Of ms-swift 4.6.
"""

# ms-swift puts the folder of a plugin on Python's path: there may be no transformers.py beside it
from fusedpo.lazy import lazy_logits

lazy_logits()
