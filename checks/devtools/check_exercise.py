"""What `make test` asks of one exercise: its files filled, their form, its bank. One line for each thing to do."""

from devtools import kill_matrix, patterns, practised, rules
from harness.commands.request import one_exercise
from harness.model import bank
from harness.report import terminal
from harness.runner import session
from harness.runner.judge import Judge
from harness.testing.check import Check


def run(ex: str) -> int:
    """Prints what is to be done; 1 if there is anything."""
    exercise, out = one_exercise("check-exercise", ex), terminal.console()

    def say(problem: str) -> None:
        out.print(problem, style="red", markup=False, soft_wrap=True)

    if problems := list(rules.missing(exercise)) or list(rules.unfilled(exercise)):
        for problem in problems:
            say(problem)
        say(f"{exercise.id}: the form and the bank are judged once this is done")
        return 1
    form = [problem for rule in (*rules.FORM, rules.not_as_shipped) for problem in rule(exercise)]
    for problem in form:
        say(problem)

    bank.mistakes(exercise)  # Before the checks are collected, which read it too: what it cannot hold is one line.

    def judge(checks: list[Check]) -> int:
        judging = Judge(checks, halves=False)
        matrix = kill_matrix.build(judging, exercise)
        if not matrix.problems:
            matrix.problems += [*practised.renew(judging, exercise), *practised.problems(judging, exercise, full=False)]
        kill_matrix.show(matrix, out)
        if not matrix.problems:
            out.print(patterns.write(judging, exercise, matrix.patterns), soft_wrap=True)
        return len(matrix.problems)

    bank_fails = session.collected(judge, exercise.id)
    if form or bank_fails:
        return 1
    out.print(f"{exercise.id}: holds; make lint judges its style")
    return 0
