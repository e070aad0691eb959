"""Print docs/FLAGS.md, the page of all flags, from the parsers of Trainer.py and Tester.py.

    python scripts/flags_page.py > docs/FLAGS.md
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from utils.cli import run
import Tester
import Trainer

HEAD = """# Flags

Printed by `python scripts/flags_page.py > docs/FLAGS.md`; a test compares it with the parsers.

Trainer.py and Tester.py share their flags. Tester.py takes the flags of training for compatibility;
of them `--seed` alone, the seed of z, has an effect there. A flag on the command line beats the
recipe, and the recipe beats the template's default. *template* is the value under `--recipe
template`. *default* is the value of a command that names no recipe, bold where it differs. An empty
cell is None. `--help` shows the defaults of the recipe on the same command line.
"""

TABLE = "| flag | template | default | meaning |\n| --- | --- | --- | --- |"


def shown(value):
    """Return a default as the page shows it."""
    if isinstance(value, bool):
        return "on" if value else "off"
    return "" if value is None else f"`{value}`"


def row(action, template, default):
    """Return the row of a flag; template and default are all flags' values, by name."""
    names = ", ".join(f"`{name}`" for name in action.option_strings)
    own, other = (shown(values[action.dest]) for values in (default, template))
    meaning = action.help.replace("|", "\\|")
    if not all(choice in meaning for choice in action.choices or ()):
        meaning = f"{', '.join(action.choices)}: {meaning}"
    return f"| {names} | {other} | {own if own == other else f'**{own}**'} | {meaning} |"


def table(program, title, actions):
    """Return the table of a group of flags under its title."""
    template, default = (vars(program.build_parser().parse_args(words))
                         for words in (["--recipe", "template"], []))
    rows = "\n".join(row(action, template, default) for action in actions)
    return f"## {title}\n\n{TABLE}\n{rows}\n"


def page():
    """Return the page: the flags that both programs have by group, then those of one alone."""
    shared, alone, seen = [], [], {"help"}
    for program in Trainer, Tester:
        for group in program.build_parser()._action_groups:
            actions = [action for action in group._group_actions
                       if action.dest not in seen and action.help != argparse.SUPPRESS]
            seen |= {action.dest for action in actions}
            if actions and group.title == "options":
                alone.append(table(program, f"{program.__name__}.py alone", actions))
            elif actions:
                shared.append(table(program, group.title.capitalize(), actions))
    return "\n".join([HEAD, *shared, *alone])


def main():
    """Print the page."""
    print(page(), end="")


if __name__ == "__main__":
    run(main)
