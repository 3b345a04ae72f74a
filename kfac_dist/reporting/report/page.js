const charts = () => document.querySelectorAll('.js-plotly-plot');

// Figures take their ink from the page, now and when the reader's setting changes.
async function dress() {
  const of = name => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const axis = {gridcolor: of('--rule'), zerolinecolor: of('--rule'), linecolor: of('--rule')};
  const shades = {colorscale: [[[0, of('--low')], [1, of('--high')]]], 'textfont.color': of('--ink')};
  for (const chart of charts()) {
    const change = {'font.color': of('--ink'), 'hoverlabel.bgcolor': of('--card'), 'hoverlabel.font.color': of('--ink')};
    for (const name of ['xaxis', 'yaxis'])
      for (const [key, value] of Object.entries(axis)) change[name + '.' + key] = value;
    const shaded = chart.data[0]?.type === 'heatmap';
    await Plotly.update(chart, shaded ? shades : {}, change, shaded ? [0] : []);
    await fit(chart);
  }
  document.body.dataset.dressed = 'yes';
}

// A long legend makes its chart taller, not its curves flatter.
async function fit(chart) {
  await Plotly.Plots.resize(chart);
  const legend = chart.querySelector('.legend');
  if (!legend) return;
  const frame = chart.parentElement, usual = parseFloat(frame.dataset.height ??= frame.style.height);
  const rows = legend.getBoundingClientRect().height;
  const height = Math.round(Math.max(usual, usual + rows - 50, 2 * rows + 20)) + 'px';
  if (frame.style.height === height) return;
  frame.style.height = height;
  await Plotly.Plots.resize(chart);
}

// Menus are the browser's own: for keyboards and thumbs, with room for hundreds of entries, in light and dark.
function addMenu(chart) {
  const {label, traces, choices} = chart.layout.meta || {};
  if (!choices) return;
  const line = document.createElement('label'), menu = document.createElement('select');
  for (const [name] of choices) {
    const option = document.createElement('option');
    option.innerHTML = name; // escaped already, for plotly
    menu.append(option);
  }
  menu.onchange = () => Plotly.restyle(chart, choices[menu.selectedIndex][1], traces).then(() => fit(chart));
  line.append(label, menu);
  chart.closest('.card').prepend(line);
}

window.addEventListener('load', () => { charts().forEach(addMenu); dress(); });
let width = innerWidth; // a telephone's address bar changes the height alone
window.addEventListener('resize', () => { if (width !== (width = innerWidth)) charts().forEach(fit); });
matchMedia('(prefers-color-scheme: dark)').addEventListener('change', dress);
