"""What the demo prints at the end: the accuracies as a table, and what they say in one line."""

from .texts import Task

Accuracies = dict[str, dict[str, float]]  # model -> task -> fraction of 1


def table(tasks: tuple[Task, ...], accuracies: Accuracies) -> str:
    """Test accuracy in percent, a row for each task, a column for each model."""
    width = max(len(model) for model in accuracies) + 3
    rows = ["  accuracy in %".ljust(34) + "".join(model.rjust(width) for model in accuracies)]
    for task in tasks:
        name = f"  {task.name} ({len(task.labels)} answers, {len(task.test)} texts)".ljust(34)
        cells = (f"{100 * by_task[task.name]:.1f}" for by_task in accuracies.values())
        rows.append(name + "".join(cell.rjust(width) for cell in cells))
    return "\n".join(rows)


def reading(tasks: tuple[Task, ...], accuracies: Accuracies) -> str:
    """How much of what each specialist gained over the base the merge keeps, with its cost."""
    kept, lost = [], []
    for task in tasks:
        base, expert, merged = (accuracies[m][task.name] for m in ("base", task.name, "merge"))
        error = (merged * (1 - merged) / len(task.test)) ** 0.5
        if expert <= base:
            return f"{task.name}: the fine-tune gained nothing over the base, nothing to keep."
        if merged <= base:
            return f"{task.name}: the merge is no better than the base; do not use this one."
        kept.append(f"{(merged - base) / (expert - base):.0%} on {task.name}")
        lost.append(f"{100 * (expert - merged):.1f} +- {100 * error:.1f}")
    return (
        f"One merged model keeps {' and '.join(kept)} of what the fine-tunes gained;\n"
        f"it stays {' and '.join(lost)} points behind them, each on its own task."
    )
