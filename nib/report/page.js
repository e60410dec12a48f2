// Draws the charts, and fetches the page anew while report.py --watch serves it.
// A plot is 1000 wide and 1000 high in SVG units; it stretches with its box. Its text is HTML.
const page = document.getElementById('page')
const toolbar = document.getElementById('toolbar')
const hidden = new Set()  // names of series and of runs that are switched off
const parsed = new WeakMap()

function read(holder) {
  if (!parsed.has(holder)) parsed.set(holder, JSON.parse(holder.querySelector('script[type="application/json"]').textContent))
  return parsed.get(holder)
}

function make(tag, attributes = {}, ...children) {
  const svg = ['svg', 'path', 'rect'].includes(tag)
  const made = svg ? document.createElementNS('http://www.w3.org/2000/svg', tag) : document.createElement(tag)
  for (const [name, value] of Object.entries(attributes)) if (value !== null) made.setAttribute(name, value)
  made.append(...children)
  return made
}

// -- numbers and axes ----------------------------------------------------------------------------

function show(value, digits = 5) {
  if (value === null) return 'not finite'
  const size = Math.abs(value)
  if (size && (size < 1e-4 || size >= 1e15)) return value.toExponential(digits - 1).replace(/\.?0+e\+?/, 'e')
  return value.toLocaleString('en', {maximumSignificantDigits: digits, notation: digits < 5 && size >= 1e4 ? 'compact' : 'standard'})
}

function axisOf(low, high, log, dense) {
  const scale = log ? value => Math.log10(Math.max(value, low)) : value => value
  const share = value => (scale(value) - scale(low)) / (scale(high) - scale(low))
  const at = part => { const value = scale(low) + part * (scale(high) - scale(low)); return log ? 10 ** value : value }
  return {low, high, share, at, ticks: ticksOf(low, high, log, dense)}
}

function ticksOf(low, high, log, dense) {
  const ticks = []
  if (log) {
    const first = Math.floor(Math.log10(low)), last = Math.ceil(Math.log10(high)), every = Math.ceil((last - first) / 6)
    for (let power = first; power <= last; power += every)
      for (const factor of every === 1 && last - first < 4 ? [1, 2, 5] : [1]) ticks.push(factor * 10 ** power)
    const inside = ticks.filter(tick => tick >= low && tick <= high)
    if (inside.length > 1) return inside
    ticks.length = 0
  }
  const rough = (high - low) / 5, power = 10 ** Math.floor(Math.log10(rough))
  const width = power * [1, 2, 5, 10].find(factor => factor * power >= (dense ? 0.7 : 0.999) * rough)
  for (let index = Math.ceil(low / width - 1e-9); index * width <= high + 1e-9 * width && ticks.length < 12; index++)
    ticks.push(Number((index * width).toPrecision(12)))
  return ticks
}

// The place of a step of a run on the horizontal axis: a step, a number of tokens or hours.
function placeOf(run, step) {
  const {tokens, steps, hours} = read(toolbar).runs[run], unit = toolbar.x.value
  if (unit === 'step') return step
  if (unit === 'tokens') return tokens * step
  const near = nearest(steps, step), left = Math.max(0, Math.min(steps.length - 2, steps[near] > step ? near - 1 : near))
  return hours[left] + (hours[left + 1] - hours[left]) * (step - steps[left]) / (steps[left + 1] - steps[left])
}

function horizontalAxis(figures) {
  const places = figures.flatMap(figure => read(figure).series.flatMap(one => [0, one.steps.length - 1].map(end => placeOf(one.run, one.steps[end]))))
  let low = Math.min(...places), high = Math.max(...places)
  const log = toolbar.logX.checked, from = parseFloat(toolbar.from.value), to = parseFloat(toolbar.to.value)
  if (low < 0.02 * high) low = log ? high / 1000 : 0
  if (from < (isNaN(to) ? high : to)) low = log ? Math.max(from, high / 1e6) : from
  if (to > low) high = to
  return low < high ? axisOf(low, high, log) : axisOf(low - 1, high + 1, false)
}

function verticalAxis(data, lines, across) {
  const zoomed = toolbar.from.value || toolbar.to.value
  const fall = toolbar.fall.checked || zoomed ? 0 : data.initialDrop, ends = {}
  for (const {run, places} of lines) ends[run] = places.reduce((a, b) => Math.max(a, b), ends[run] ?? across.low)
  const start = run => across.low + fall * (Math.min(ends[run] ?? across.low, across.high) - across.low)  // a short run has a short initial drop
  const values = lines.flatMap(one => one.drawn.filter((value, index) => value !== null && (one.drawn.length < 3 || one.places[index] >= start(one.run)) && one.places[index] <= across.high))  // two points: both, or nothing of their line is in sight
  values.push(...data.marks.filter(([run, step]) => run in ends && placeOf(run, step) >= start(run)).map(mark => mark[2]))
  if (!zoomed) values.push(...data.level ? [data.level[0]] : [], ...data.band ?? [])
  const log = toolbar.y.value === 'log' || toolbar.y.value === 'auto' && data.log
  const usable = log ? values.filter(value => value > 1e-290) : values
  let low = usable.length ? usable.reduce((a, b) => Math.min(a, b)) : 1, high = usable.length ? usable.reduce((a, b) => Math.max(a, b)) : 10
  if (log) {
    low = Math.max(low, high / 1e12)
    const room = high > 1.001 * low ? (high / low) ** 0.05 : 2
    return axisOf(low / room, high * room, true, true)
  }
  if (data.fromZero && !zoomed) low = Math.min(low, 0)
  const room = high - low > 1e-9 * Math.abs(high) ? 0.06 * (high - low) : 0.1 * Math.abs(high) || 1
  return axisOf(data.fromZero && low === 0 ? 0 : low - room, high + room, false, true)
}

// An exponential moving average without the bias towards its start (Kingma and Ba 2015, section 3).
function smooth(values) {
  const keep = Number(toolbar.smoothing.value)
  let mean = 0, weight = 0
  return values.map(value => {
    if (value === null) return null
    mean = keep * mean + (1 - keep) * value
    weight = keep * weight + (1 - keep)
    return mean / weight
  })
}

// -- drawing -------------------------------------------------------------------------------------

function drawAll() {
  const figures = [...page.querySelectorAll('.chart[id]')]
  for (const unit of toolbar.x.options) unit.disabled = !(read(toolbar).units.includes(unit.value))
  if (figures.length) {
    const across = horizontalAxis(figures)
    for (const figure of figures) draw(figure, across)
  }
  for (const box of page.querySelectorAll('input[data-run]')) box.checked = !hidden.has(box.dataset.run)
}

function draw(figure, across) {
  const data = read(figure), plot = figure.querySelector('.plot'), several = data.series.some(one => one.run)
  const lines = data.series.filter(one => !hidden.has(one.run || one.name)).map(one => {
    const places = one.steps.map(step => placeOf(one.run, step))
    const noisy = one.line && one.values.length > 10 && !data.series.some(other => other.name === `${one.name}, medians`)
    return {...one, places, smoothed: noisy && Number(toolbar.smoothing.value) > 0, drawn: noisy ? smooth(one.values) : one.values}
  })
  const up = verticalAxis(data, lines, across)
  const x = place => Math.round(10000 * across.share(place)) / 10, y = value => Math.round(10000 - 10000 * up.share(value)) / 10
  const svg = make('svg', {viewBox: '0 0 1000 1000', preserveAspectRatio: 'none', 'aria-hidden': 'true'}), texts = []
  const add = (name, d, more = {}) => svg.append(make('path', {class: name, d, ...more}))
  const dots = points => points.map(([left, top]) => `M${left} ${top}h0`).join('')  // round caps make them dots

  for (const tick of up.ticks) {
    add('grid', `M0 ${y(tick)}H1000`)
    texts.push(make('span', {class: 'y', style: `top:${y(tick) / 10}%`}, show(tick, 4)))
  }
  for (const tick of across.ticks) texts.push(make('span', {class: 'x', style: `left:${x(tick) / 10}%`}, show(tick, 4)))
  texts.push(make('span', {class: 'unit'}, toolbar.x.value))
  if (data.band) svg.append(make('rect', {class: 'band', width: 1000, y: y(data.band[1]), height: Math.max(0, y(data.band[0]) - y(data.band[1]))}))
  if (data.level) add('level', `M0 ${y(data.level[0])}H1000`)
  for (const one of lines) {
    const inside = one.places.map((place, index) => place >= across.low && place <= across.high || (one.places[index + 1] > across.low && place < across.high) || (one.places[index - 1] < across.high && place > across.low))
    const points = values => values.map((value, index) => inside[index] ? [x(one.places[index]), value === null ? null : y(value)] : null).filter(point => point)
    const line = (name, values) => add(name, pathOf(points(values)), {'stroke-dasharray': one.dashes || null})
    if (one.smoothed) line(`c${one.color} pale`, one.values)
    if (one.line) line(`c${one.color}${one.pale && !one.smoothed ? ' pale' : ''}`, one.drawn)
    if (one.dots) add(`c${one.color} ${one.values.length > 180 ? 'small ' : ''}dot`, dots(points(one.values).filter(point => point[1] !== null)))
    const gaps = points(one.values).filter(point => point[1] === null)
    if (gaps.length) add('gap', dots(gaps.map(([left]) => [left, 4])))
  }
  for (const [run, step, value, , color] of data.marks) {
    const place = placeOf(run, step), at = dots([[x(place), y(value)]])
    if (hidden.has(run || 'validation') || place < across.low || place > across.high) continue
    add(`c${color} ring`, at)
    add('hole', at)
  }
  const ends = []  // of the rows of badges above the plot
  for (const [run, step, number, name, severity] of read(toolbar).flags) {
    const share = across.share(placeOf(run, step))
    if (share < 0 || share > 1 || hidden.has(run)) continue
    add(`flag ${severity}`, `M${1000 * share} 0V1000`)
    let row = ends.findIndex(end => end <= share)
    if (row < 0) row = ends.length
    ends[row] = share + 0.06
    texts.push(make('b', {class: `badge ${severity}`, 'data-finding': number, title: name, style: `left:${100 * share}%;top:${-20 * (row + 1)}px`}, number))
  }
  drawLegend(figure, data, several)
  figure.querySelector('.legend').style.marginBottom = `${20 * ends.length + 8}px`
  plot.replaceChildren(svg, ...texts, make('div', {class: 'cursor'}), make('div', {class: 'select'}), make('div', {class: 'tip'}))
  Object.assign(plot, {lines, across})
}

function pathOf(points) {
  let path = '', pen = 'M'
  points.forEach(([left, top], index) => {
    if (top !== null) path += `${pen}${left} ${top}` + (pen === 'M' && (points[index + 1]?.[1] ?? null) === null ? 'h0' : '')
    pen = top === null ? 'M' : 'L'
  })
  return path
}

// One run: an entry switches its series. Several runs are switched in the table of the runs.
function drawLegend(figure, data, several) {
  const legend = figure.querySelector('.legend'), entries = [], focused = document.activeElement?.dataset.series
  const key = (...parts) => make('svg', {class: 'key', viewBox: '0 0 24 10', 'aria-hidden': 'true'}, ...parts)
  const path = (name, d, more = {}) => make('path', {class: name, d, ...more})
  if (data.band) entries.push([key(make('rect', {class: 'band', width: 24, height: 10})), `healthy: ${show(data.band[0])} to ${show(data.band[1])}`])
  if (data.level) entries.push([key(path('level', 'M0 5H24')), data.level[1]])
  if (!several && data.series.length > 1) for (const one of data.series) {
    const look = one.line ? path(`c${one.color}${one.pale ? ' pale' : ''}`, 'M0 5H24', {'stroke-dasharray': one.dashes || null}) : path(`c${one.color} dot`, 'M12 5h0')
    entries.push([make('button', {type: 'button', 'data-series': one.name, 'aria-pressed': !hidden.has(one.name)}, key(look), one.name)])
  }
  for (const [, , , label, color] of data.marks) if (label) entries.push([key(path(`c${color} ring`, 'M12 5h0'), path('hole', 'M12 5h0')), label])
  if (data.series.some(one => one.values.includes(null))) entries.push([key(path('gap', 'M12 5h0')), 'not finite'])
  const held = legend.contains(document.activeElement)
  legend.replaceChildren(...entries.map(parts => make('li', {}, ...parts)))
  if (held) [...legend.querySelectorAll('button')].find(one => one.dataset.series === focused)?.focus()
}

// The table of a chart's values, filled when it is opened.
function fillTable(details) {
  if (!details.matches('.data') || !details.open || details.querySelector('table')) return
  const figure = details.parentElement, {series} = read(figure)
  const steps = [...new Set(series.flatMap(one => one.steps))].sort((a, b) => a - b)
  const values = series.map(one => new Map(one.steps.map((step, index) => [step, one.values[index]])))
  const head = ['step', ...series.map(one => one.run ? `${one.run}: ${one.name}` : one.name)].map(name => make('th', {scope: 'col'}, name))
  const rows = steps.map(step => make('tr', {}, make('th', {scope: 'row'}, step.toLocaleString('en')), ...values.map(one => make('td', {}, one.has(step) ? show(one.get(step)) : ''))))
  const name = details.querySelector('summary').textContent
  details.append(make('div', {class: 'wide', tabindex: 0, role: 'region', 'aria-label': name}, make('table', {}, make('thead', {}, make('tr', {}, ...head)), make('tbody', {}, ...rows))))
}

// -- pointer -------------------------------------------------------------------------------------

let dragged = null, last = null  // the plot and the place where a drag began; the last event of the pointer

function hide() {
  for (const one of page.querySelectorAll('.cursor, .tip, .select')) one.style.display = 'none'
}

function nearest(places, wanted) {
  let low = 0, high = places.length - 1
  while (high - low > 1) {
    const middle = (low + high) >> 1
    if (places[middle] < wanted) low = middle; else high = middle
  }
  return wanted - places[low] < places[high] - wanted ? low : high
}

function shareOf(plot, event) {
  const box = plot.getBoundingClientRect()
  return Math.min(1, Math.max(0, (event.clientX - box.left) / box.width))
}

function point(event) {
  last = event
  hide()
  const plot = dragged?.plot ?? document.elementFromPoint(event.clientX, event.clientY)?.closest('.plot')
  if (!plot?.lines?.length) return
  const {lines, across} = plot, share = shareOf(plot, event), wanted = across.at(share)
  if (dragged && Math.abs(share - dragged.share) > 0.01) {
    const [left, right] = [share, dragged.share].sort((a, b) => a - b)
    plot.querySelector('.select').style = `display:block;left:${100 * left}%;width:${100 * (right - left)}%`
  }
  const chosen = lines.map(one => nearest(one.places, wanted))
  const distances = chosen.map((index, number) => Math.abs(lines[number].places[index] - wanted))
  const closest = distances.indexOf(Math.min(...distances))
  const place = lines[closest].places[chosen[closest]], step = lines[closest].steps[chosen[closest]]
  const tip = plot.querySelector('.tip'), width = plot.offsetWidth, near = (across.high - across.low) / 50
  const unit = toolbar.x.value === 'step' ? '' : `, ${show(place)} ${toolbar.x.value}`
  const row = (color, name, value = '') => make('div', {}, make('i', {style: `background:var(--${color})`}), make('em', {}, name), make('strong', {}, value))
  tip.replaceChildren(make('b', {}, `step ${step.toLocaleString('en')}${unit}`))
  lines.forEach((one, number) => {
    const at = one.steps[chosen[number]], away = Math.abs(one.places[chosen[number]] - place)
    if (away > 0 && (!one.line || away > 5 * near)) return
    const name = (one.run ? `${one.run}: ${one.name}` : one.name) + (at === step ? '' : ` (${at.toLocaleString('en')})`)
    tip.append(row(`c${one.color}`, name, show(one.drawn[chosen[number]])))
  })
  for (const [run, at, number, name, severity] of read(toolbar).flags)
    if (Math.abs(placeOf(run, at) - place) < near / 2) tip.append(row(severity, `${number} ${name}`))
  const shown = across.share(place)
  tip.style.display = 'block'
  const beside = shown <= 0.5 ? shown * width + 10 : shown * width - 10 - tip.offsetWidth
  tip.style.left = `${Math.max(0, Math.min(beside, width - tip.offsetWidth))}px`
  for (const cursor of page.querySelectorAll('.cursor')) cursor.style = `display:block;left:${100 * shown}%`
}

function zoom(from, to) {
  toolbar.from.value = from
  toolbar.to.value = to
  drawAll()
}

document.addEventListener('pointermove', point)
document.addEventListener('pointerdown', event => {
  const plot = event.target.closest('.plot')
  if (plot?.across && event.pointerType !== 'touch' && event.button === 0 && !event.target.closest('.badge')) {
    dragged = {plot, share: shareOf(plot, event)}
    event.preventDefault()  // no text is selected
  }
  point(event)
})
document.addEventListener('pointerup', event => {
  if (!dragged) return
  const {plot, share} = dragged, ends = [share, shareOf(plot, event)].sort((a, b) => a - b)
  dragged = null
  if (ends[1] - ends[0] > 0.01) zoom(...ends.map(end => Number(plot.across.at(end).toPrecision(6))))
  point(event)
})
document.addEventListener('dblclick', event => event.target.closest('.plot') && zoom('', ''))
document.documentElement.addEventListener('pointerleave', hide)

// -- controls ------------------------------------------------------------------------------------

toolbar.addEventListener('submit', event => event.preventDefault())
toolbar.addEventListener('input', event => {
  if (event.target === toolbar.x) toolbar.from.value = toolbar.to.value = ''
  drawAll()
})
toolbar.addEventListener('reset', () => setTimeout(drawAll))
document.addEventListener('toggle', event => fillTable(event.target), true)
page.addEventListener('change', event => toggle(event.target.dataset.run, event.target.checked))
page.addEventListener('click', event => {
  const entry = event.target.closest('[data-series]'), head = event.target.closest('th button')
  if (entry) toggle(entry.dataset.series, hidden.has(entry.dataset.series))
  if (event.target.dataset.finding) location.hash = `finding-${event.target.dataset.finding}`
  if (head) sortTable(head.closest('th'))
})

function toggle(name, shown) {
  if (name === undefined) return
  if (shown) hidden.delete(name); else hidden.add(name)
  drawAll()
}

let sorted = null  // the column by which the runs are sorted, and the direction
function sortTable(head, descending = head.getAttribute('aria-sort') === 'ascending') {
  const table = head.closest('table'), body = table.tBodies[0], column = head.cellIndex
  sorted = {name: head.textContent, descending}
  const value = row => row.cells[column].dataset.value ?? row.cells[column].textContent
  const order = (a, b) => value(a) === '' || value(b) === '' ? (value(a) === '') - (value(b) === '')
    : (descending ? -1 : 1) * value(a).localeCompare(value(b), 'en', {numeric: true})
  const byNumber = (a, b) => (descending ? -1 : 1) * (value(a) - value(b))
  const rows = [...body.rows], numbers = rows.every(row => value(row) === '' || !isNaN(value(row)))
  body.append(...rows.sort((a, b) => numbers && value(a) !== '' && value(b) !== '' ? byNumber(a, b) : order(a, b)))
  for (const one of table.tHead.rows[0].cells) one.removeAttribute('aria-sort')
  head.setAttribute('aria-sort', descending ? 'descending' : 'ascending')
}

// -- report.py --watch ---------------------------------------------------------------------------

let shown = null
async function refresh() {
  let state
  try {
    const answer = await fetch(location.pathname, {cache: 'no-store'}), content = await answer.text()
    if (answer.ok && content !== shown) {
      if (shown !== null) replacePage(new DOMParser().parseFromString(content, 'text/html'))
      shown = content
    }
    state = answer.ok ? 'live: follows the run' : content
  } catch {
    state = 'no longer live: report.py --watch has ended'
  }
  document.getElementById('live').textContent = state
}

// Replaces the page but keeps what the reader has done to it. The toolbar itself stays.
function replacePage(fresh) {
  const open = [...page.querySelectorAll('details[open]')].map(one => one.id), scroll = [scrollX, scrollY]
  const regions = [...page.querySelectorAll('[role=region]')].map(one => [one.ariaLabel, one.scrollLeft, one.scrollTop])
  const focusable = holder => [...holder.querySelectorAll('a, button, input, select, summary, [tabindex]')]
  const focused = document.activeElement, holder = focused.closest('[id]')?.id, place = holder ? focusable(document.getElementById(holder)).indexOf(focused) : -1
  const fields = fresh.getElementById('toolbar').querySelector('script')
  toolbar.querySelector('script').replaceWith(fields)
  parsed.delete(toolbar)
  fresh.getElementById('toolbar').replaceWith(toolbar)
  page.replaceChildren(...fresh.getElementById('page').childNodes)
  for (const id of open) document.getElementById(id)?.setAttribute('open', '')
  drawAll()
  for (const details of page.querySelectorAll('details[open]')) fillTable(details)
  const head = [...page.querySelectorAll('.runs thead th')].find(one => one.textContent === sorted?.name)
  if (head) sortTable(head, sorted.descending)
  for (const region of page.querySelectorAll('[role=region]')) {
    const before = regions.find(([label]) => label === region.ariaLabel)
    if (before) [region.scrollLeft, region.scrollTop] = before.slice(1)
  }
  if (place >= 0) focusable(document.getElementById(holder) ?? page)[place]?.focus({preventScroll: true})
  scrollTo(...scroll)
  if (last) point(last)
}

drawAll()
if ('watching' in document.body.dataset) {
  refresh()
  setInterval(refresh, 3000)
}
