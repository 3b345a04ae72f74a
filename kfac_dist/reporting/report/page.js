// Figures take their ink from the page, now and when the reader's setting changes.
function dress() {
  const of = name => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const axis = {gridcolor: of('--rule'), zerolinecolor: of('--rule'), linecolor: of('--rule')};
  for (const chart of document.querySelectorAll('.js-plotly-plot')) {
    const change = {'font.color': of('--ink'), 'hoverlabel.bgcolor': of('--card'), 'hoverlabel.font.color': of('--ink')};
    for (const name of ['xaxis', 'yaxis'])
      for (const [key, value] of Object.entries(axis)) change[name + '.' + key] = value;
    if ((chart.layout.updatemenus || []).length) {
      change['updatemenus[0].bgcolor'] = of('--card'); change['updatemenus[0].bordercolor'] = of('--rule'); }
    Plotly.relayout(chart, change).then(() => Plotly.Plots.resize(chart));
  }
}
window.addEventListener('load', dress);
matchMedia('(prefers-color-scheme: dark)').addEventListener('change', dress);
