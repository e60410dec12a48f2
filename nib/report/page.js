// Shows the values under the pointer and, while report.py --watch serves the page, fetches it anew.
const page = document.getElementById('page')
const known = new WeakMap()

function dataOf(figure) {
  if (!known.has(figure)) known.set(figure, JSON.parse(figure.querySelector('script').textContent))
  return known.get(figure)
}

function nearest(steps, wanted) {
  let low = 0, high = steps.length - 1
  while (high - low > 1) {
    const middle = (low + high) >> 1
    if (steps[middle] < wanted) low = middle; else high = middle
  }
  return wanted - steps[low] < steps[high] - wanted ? low : high
}

function show(value) {
  if (value === null) return 'not finite'
  const size = Math.abs(value)
  return size && (size < 1e-3 || size >= 1e9) ? value.toExponential(3) : value.toLocaleString('en', {maximumSignificantDigits: 5})
}

function element(name, content) {
  const made = document.createElement(name)
  made.textContent = content
  return made
}

function hide() {
  for (const one of page.querySelectorAll('.cursor, .tip')) one.style.display = 'none'
}

function point(event) {
  const plot = event.target.closest?.('.plot')
  hide()
  if (!plot) return
  const box = plot.getBoundingClientRect(), data = dataOf(plot.parentElement)
  const [first, last] = data.time
  const wanted = first + (last - first) * Math.min(1, Math.max(0, (event.clientX - box.left) / box.width))
  const places = data.series.map(series => nearest(series.steps, wanted))
  const distances = places.map((place, index) => Math.abs(data.series[index].steps[place] - wanted))
  const closest = distances.indexOf(Math.min(...distances))
  const step = data.series[closest].steps[places[closest]], share = (step - first) / (last - first)
  const tip = plot.querySelector('.tip')
  tip.replaceChildren(element('b', `step ${step.toLocaleString('en')}`))
  data.series.forEach((series, index) => {
    const at = series.steps[places[index]], row = element('div', ''), dot = element('i', '')
    if (at !== step && (series.dots || Math.abs(at - step) > (last - first) / 10)) return
    dot.style.background = `var(--c${series.colour})`
    const name = series.name + (at === step ? '' : ` (${at.toLocaleString('en')})`)
    row.append(dot, element('em', name), element('strong', show(series.values[places[index]])))
    tip.append(row)
  })
  for (const [at, name, severity] of data.flags) {
    if (Math.abs(at - step) > (last - first) / 100) continue
    const row = element('div', ''), dot = element('i', '')
    dot.style.background = `var(--${severity})`
    row.append(dot, element('em', name))
    tip.append(row)
  }
  tip.style.display = 'block'
  const beside = share <= 0.5 ? share * box.width + 10 : share * box.width - 10 - tip.offsetWidth
  tip.style.left = `${Math.max(0, Math.min(beside, box.width - tip.offsetWidth))}px`
  for (const cursor of page.querySelectorAll('.cursor')) {  // on every chart, as they have one time axis
    cursor.style.left = `${100 * share}%`
    cursor.style.display = 'block'
  }
}

let shown = null
async function refresh() {
  let state
  try {
    const answer = await fetch(location.pathname, {cache: 'no-store'}), content = await answer.text()
    if (answer.ok && content !== shown) {
      const open = [...page.querySelectorAll('details[open]')].map(one => one.id)
      const fresh = new DOMParser().parseFromString(content, 'text/html').getElementById('page')
      if (shown !== null) page.replaceChildren(...fresh.childNodes)
      for (const id of open) document.getElementById(id)?.setAttribute('open', '')
      shown = content
    }
    state = answer.ok ? 'live: follows the run' : content
  } catch {
    state = 'no longer live: report.py --watch has ended'
  }
  document.getElementById('live').textContent = state
}

document.addEventListener('pointermove', point)
document.addEventListener('pointerdown', point)
document.addEventListener('pointerleave', hide)
if ('watching' in document.body.dataset) {
  refresh()
  setInterval(refresh, 3000)
}
