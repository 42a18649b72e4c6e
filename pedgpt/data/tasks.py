"""The three tasks of PedCorpus that stage 4 specialises a model in."""

MEDKQA, EVIDIAG, TRERECOM = "MedKQ&A", "EviDiag", "TreRecom"
TASKS = {MEDKQA: "medkqa", EVIDIAG: "evidiag", TRERECOM: "trerecom"}  # each task's table in a corpus, under tasks/
