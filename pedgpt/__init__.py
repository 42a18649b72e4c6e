"""pedgpt: PediatricsGPT (NeurIPS 2024) from scratch in PyTorch.

The data flows one way, and so do the imports:

    records → tokens → model (+ adapter) → loss → step → checkpoint → evaluation
    └──── data ────┘  models  adapters   losses  └── training ──┘   evaluation
"""

__version__ = "0.1.0"
