"""pedgpt: PediatricsGPT (NeurIPS 2024) from scratch in PyTorch.

The data flows one way, and so do the imports:

    records → tokens → model (+ adapter) → loss → step → checkpoint → evaluation
    └──── data ────┘  models  adapters   losses  └── training ──┘   evaluation
"""

from pedgpt.files import __version__ as __version__
