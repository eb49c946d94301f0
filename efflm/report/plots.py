"""Quality against size and against decode time."""

from pathlib import Path

from efflm.report.rows import Row
from efflm.rundir import write_whole


def pareto(rows: list[Row], path: Path) -> None:
    """Two panels: bits per byte against bytes on disk, and against milliseconds a decoded token; lower left wins."""
    import io

    import matplotlib  # here, for its only use: it is slow to import

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(11, 4.8), sharey=True, layout="constrained")
    sizes = [row.bytes / 1e6 for row in rows]
    times = [1e3 / row.decode_tokens_per_second for row in rows]
    for axis, xs, label in ((panels[0], sizes, "MB on disk"), (panels[1], times, "ms a decoded token, batch 1")):
        colors = pyplot.get_cmap("tab10").colors
        for index, (row, x) in enumerate(zip(rows, xs, strict=True)):
            axis.errorbar(
                x,
                row.bits_per_byte,
                yerr=row.bits_per_byte_stderr,
                fmt="os^DvPX*<>"[index % 10],
                color=colors[index % 10],
                markersize=8,
                elinewidth=0.8,
                ecolor="0.8",
                label=row.name,
                zorder=3,
            )
        axis.set_xlabel(label)
        axis.set_xlim(left=0)
        axis.grid(color="0.92", zorder=0)
        axis.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("bits per byte of test text (s.e. over documents)")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right center", frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, metadata={"Software": None})
    pyplot.close(figure)
    write_whole(path, buffer.getvalue())
