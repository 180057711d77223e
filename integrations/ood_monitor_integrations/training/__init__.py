"""What watching a training takes, whoever trains: it knows no trainer.

A detector is fitted in a pass of its own over held-out data (:mod:`.loading`, :mod:`.collection`),
belongs to weights by their digest (:mod:`.detectors`), and watches a stage in one process or in
several (:mod:`.stage_monitor`, :mod:`.collectives`). The training stream looks at gradients
(:mod:`.gradients`). Whatever fails is counted and told once (:mod:`.failures`).
"""
