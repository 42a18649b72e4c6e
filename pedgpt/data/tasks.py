"""The three tasks of PedCorpus that stage 4 specialises a model in."""

MEDKQA, EVIDIAG, TRERECOM = "MedKQ&A", "EviDiag", "TreRecom"
TASKS = {MEDKQA: "tasks/medkqa", EVIDIAG: "tasks/evidiag", TRERECOM: "tasks/trerecom"}  # each task's table in a corpus
