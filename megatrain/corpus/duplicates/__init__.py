"""Finds copies among documents and lines, and documents that contain an evaluation set.

Documents come in units, numbered in the order of source, file and place, each with rows 0 to n - 1; (unit, row) is the order
that decides which copy stays: the first. Files of one pass are read by the tasks of the next, and no result depends on how the
documents are divided into units, on the number of parts, or on who runs a task when.

    fingerprints    one file a unit, filled as its documents pass by:
                        with fingerprinting(path, settings) as prints: prints.add(document.text, document.kind)
    comparing       Deduplication(units, where, settings, memory).passes() gives the tasks of each pass, which may run at once:
                        places     1                 count_places: how many documents and lines each unit has
                        compared   parts             exact_task: the same 128-bit hash
                                   bands x parts     near_task: the same band, verified by all 120 numbers of the signature
                        decided    1                 merge: which documents stay
                        lines      parts             lines_task: lines of documents that stay, the same as an earlier one
    removing        removals().of(unit) -> {row: Removal(reason, representative, agreement)}
                    lines_of(unit) -> {row: [line, ...]}, and without(text, settings.lines, [line, ...]) is the text that stays
    leaks           leaks_step(settings): a step that refuses documents with passages of evaluation sets, by the rule leaks.NAME
"""
