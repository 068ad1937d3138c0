// Draws the figures, in the page's colours; draws them again when the colours change.
(() => {
  const figures = JSON.parse(document.getElementById("figures").textContent);
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const hidden = new Set();
  const config = {
    responsive: true, displaylogo: false,
    modeBarButtons: [["toImage", "zoomIn2d", "zoomOut2d", "resetScale2d"]],
  };

  // "$run0" -> the value of --run0
  const coloured = (value, style) => {
    if (typeof value === "string") return value.startsWith("$") ? style.getPropertyValue("--" + value.slice(1)).trim() : value;
    if (value && value.length > 2 && typeof value[0] === "number") return value;  // data
    if (Array.isArray(value)) return value.map((inner) => coloured(inner, style));
    if (value && typeof value === "object")
      return Object.fromEntries(Object.entries(value).map(([key, inner]) => [key, coloured(inner, style)]));
    return value;
  };

  const axis = (given) => ({
    automargin: true, gridcolor: "$grid", linecolor: "$line", zerolinecolor: "$grid", tickcolor: "$line",
    tickfont: { size: 12, color: "$soft" }, spikecolor: "$soft", spikethickness: 1, spikedash: "solid", ...given,
    title: { standoff: 8, font: { size: 12, color: "$soft" }, ...(given || {}).title },
  });

  const layout = (figure) => ({
    font: { family: getComputedStyle(document.body).fontFamily, size: 13, color: "$ink" },
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", margin: { l: 48, r: 12, t: 8, b: 40 },
    hovermode: "x unified", hoverlabel: { bgcolor: "$card", bordercolor: "$line", font: { color: "$ink", size: 13 } },
    showlegend: false, legend: { orientation: "h", traceorder: "normal", y: 1, yanchor: "bottom", x: 0, font: { color: "$ink", size: 12 } },
    modebar: { bgcolor: "rgba(0,0,0,0)", color: "$line", activecolor: "$soft" },
    ...figure.layout, xaxis: axis(figure.layout.xaxis), yaxis: axis(figure.layout.yaxis),
  });

  const traces = (figure) => figure.traces.map((trace) => ({
    ...trace,
    ...(trace.colorbar && { colorbar: { ...trace.colorbar, tickfont: { color: "$soft", size: 12 } } }),
    visible: !(trace.type === "scatter" && hidden.has(trace.meta)),
  }));

  const draw = (index) => {
    const figure = figures[index], style = getComputedStyle(document.documentElement);
    return Plotly.react("figure" + index, coloured(traces(figure), style), coloured(layout(figure), style), config);
  };
  const drawAll = () => figures.forEach((_, index) => draw(index));

  document.querySelectorAll("nav button").forEach((button) => button.addEventListener("click", () => {
    const run = Number(button.dataset.run);
    if (!hidden.delete(run)) hidden.add(run);
    button.setAttribute("aria-pressed", String(!hidden.has(run)));
    drawAll();
  }));
  document.querySelectorAll("select").forEach((select) => select.addEventListener("change", () => {
    const figure = figures[select.dataset.figure];
    figure.traces[0].z = figure.choices[select.value].z[0];
    draw(select.dataset.figure);
  }));
  dark.addEventListener("change", drawAll);
  drawAll();
})();
