// The page "Playground": choose an image, move the sliders, and watch boxes settle. detector.js computes.
const root = document.getElementById('in-browser')
const part = name => root.querySelector(`[data-part="${name}"]`)
const canvas = part('canvas'), curves = part('curves'), status = part('status'), list = part('list')
const TOLERANCES = [0, .5, .4, .3, .2, .15, .1, .05]
const COLOURS = ['#e45756', '#f2a900', '#2ca58d', '#4c8dff', '#b05cd6', '#ff7f50', '#8bc34a', '#00bcd4']
const MOVE = matchMedia('(prefers-reduced-motion: reduce)').matches ? 0 : 280 // milliseconds from one state to the next

let tools, detector, image, fed
let states = [] // what `settle` yielded of this image, as far as it has been asked for
let shown = 0   // state on the canvas
let turn = 0    // a newer request ends an older one

const most = () => Number(part('steps').value)
const tol = () => TOLERANCES[Number(part('tol').value)]
const score = () => Number(part('score').value)
const say = text => { status.textContent = text }
const pause = ms => new Promise(done => setTimeout(done, ms))
const frame = () => new Promise(done => requestAnimationFrame(done))

function labels() {
  part('steps-value').textContent = most()
  part('tol-value').textContent = tol() || 'off'
  part('score-value').textContent = score().toFixed(2)
}

// ---- drawing

// The number of applications at which these settings stop, of those that are known
function last() {
  const settled = states.findIndex(s => s.residual && tol() > 0 && Math.max(...s.residual) <= tol())
  return Math.min(most(), settled < 0 ? Infinity : settled, states.length - 1)
}

function box(context, corners, colour, width) {
  const [x1, y1, x2, y2] = corners
  context.strokeStyle = colour
  context.lineWidth = width
  context.strokeRect(x1, y1, Math.max(1, x2 - x1), Math.max(1, y2 - y1))
}

// Boxes between state a and state b, `part` of the way; pale ones score less than the threshold
function draw(a, b, way) {
  const context = canvas.getContext('2d'), pen = canvas.width/300
  const sx = fed.width/canvas.width, sy = fed.height/canvas.height
  context.drawImage(image.canvas, 0, 0)
  const queries = states[b].found.map((to, q) => {
    const from = states[a].found[q]
    const corners = to.box.map((v, k) => (from.box[k]*(1 - way) + v*way)/(k % 2 ? sy : sx))
    return {corners, score: from.score*(1 - way) + to.score*way, label: to.label}
  }).sort((p, q) => p.score - q.score)
  context.globalAlpha = .28
  for (const q of queries) if (q.score < score()) box(context, q.corners, 'white', pen/2)
  context.globalAlpha = 1
  for (const q of queries) if (q.score >= score()) {
    box(context, q.corners, 'white', 2.6*pen)
    box(context, q.corners, COLOURS[q.label % COLOURS.length], 1.5*pen)
  }
}

// Residuals on a log scale, up to state `n`
function plot(n) {
  const W = 420, H = 240, left = 46, right = 12, top = 16, bottom = 38, low = -2.5, high = .5
  const steps = Math.max(4, most())
  const x = t => left + (W - left - right)*(t - 1)/(steps - 1)
  const y = r => top + (H - top - bottom)*(high - Math.min(high, Math.max(low, Math.log10(Math.max(r, 1e-9)))))/(high - low)
  const grid = [1, .1, .01].map(r => `<line class="grid" x1="${left}" x2="${W - right}" y1="${y(r)}" y2="${y(r)}"/>` +
    `<text x="${left - 6}" y="${y(r) + 4}" text-anchor="end">${r}</text>`).join('')
  const ticks = Array.from({length: steps}, (_, i) => i + 1).filter(t => t===1 || t % (steps > 15 ? 5 : 2)===0)
    .map(t => `<text x="${x(t)}" y="${H - bottom + 18}" text-anchor="middle">${t}</text>`).join('')
  const limit = tol() ? `<line class="limit" x1="${left}" x2="${W - right}" y1="${y(tol())}" y2="${y(tol())}"/>` : ''
  const line = k => {
    const at = states.slice(1, n + 1).map((s, i) => `${x(i + 1).toFixed(1)},${y(s.residual[k]).toFixed(1)}`)
    const dots = at.map(p => p.split(',')).map(([cx, cy]) => `<circle cx="${cx}" cy="${cy}" r="3"/>`).join('')
    return `<g class="${['content', 'corners'][k]}"><polyline points="${at.join(' ')}"/>${dots}</g>`
  }
  curves.innerHTML = grid + ticks + limit + line(0) + line(1) +
    `<text x="${(left + W - right)/2}" y="${H - 4}" text-anchor="middle">applications of the step</text>` +
    `<text x="${left}" y="${top - 1}">residual</text>`
}

function tell(n) {
  const found = states[n].found.filter(q => q.score >= score()).sort((p, q) => q.score - p.score)
  const [sx, sy] = fed.scale
  list.innerHTML = found.map(q => {
    const corners = q.box.map((v, k) => Math.round(Math.min(k % 2 ? image.h : image.w, Math.max(0, v/(k % 2 ? sy : sx)))))
    const colour = COLOURS[q.label % COLOURS.length]
    return `<tr><td><i style="background:${colour}"></i>${detector.classes[q.label]}</td><td>${q.score.toFixed(2)}</td>` +
      `<td>${corners.join(', ')}</td></tr>`
  }).join('')
  const residual = states[n].residual
  const changed = residual ? `, residuals ${residual[0].toFixed(3)} and ${residual[1].toFixed(3)}` : ''
  const after = n===0 ? 'First guess' : `After ${n} step${n===1 ? '' : 's'}`
  say(`${after}: ${found.length} object${found.length===1 ? '' : 's'}${changed}`)
}

async function moveTo(n, mine) {
  const from = shown
  shown = n
  const begun = performance.now()
  for (let way = 0; way < 1 && MOVE;) {
    await frame()
    if (mine!==turn) return
    way = Math.min(1, (performance.now() - begun)/MOVE)
    draw(from, n, 1 - (1 - way)**3)
  }
  draw(n, n, 1)
  plot(n)
  tell(n)
}

// ---- what the reader does

// Show the states from the first guess to where the settings stop, and compute those that are missing
async function play(from = 0) {
  const mine = ++turn
  root.dataset.state = 'running'
  shown = Math.min(from, states.length - 1)
  draw(shown, shown, 1)
  plot(shown)
  if (from===0) { tell(0); await pause(2*MOVE) }
  while (mine===turn) {
    if (shown > last()) await moveTo(last(), mine)
    else if (shown < last()) await moveTo(shown + 1, mine)
    else if (last()===most() || reached()) break
    else await compute()
  }
  if (mine===turn) root.dataset.state = 'ready'
}

function reached() {
  const {residual} = states[states.length - 1]
  return residual!==null && tol() > 0 && Math.max(...residual) <= tol()
}

let feats, current // features of the image, and the state that was computed last
let computing = null

// One more state; a second request waits for the first
function compute() {
  computing ??= applied(states).finally(() => { computing = null })
  return computing
}

async function applied(mine) {
  const next = await detector.step(current, feats)
  const found = await detector.read(next.state)
  if (mine!==states) return // another image was chosen meanwhile
  current = next.state
  states.push({found, residual: next.residual})
}

async function look(source) {
  const mine = ++turn
  root.dataset.state = 'running'
  say('Looking at the image ...')
  await pause(20)
  let picture
  try { picture = await tools.loadImage(source) }
  catch { root.dataset.state = 'ready'; return say('This file is not an image that the browser can read.') }
  const input = tools.feed(picture.rgba, picture.h, picture.w, detector.side)
  const {state, rows, found} = await detector.start(input)
  if (mine!==turn) return
  image = picture
  fed = input
  feats = rows
  current = state
  states = [{found, residual: null}]
  canvas.width = picture.canvas.width
  canvas.height = picture.canvas.height
  await play()
}

function choose(button) {
  for (const b of root.querySelectorAll('[data-image]')) b.setAttribute('aria-pressed', String(b===button))
}

// Buttons of scenes show them
function thumbnails() {
  for (const b of root.querySelectorAll('[data-image]')) {
    const small = new Image()
    small.alt = b.textContent
    small.src = b.dataset.image
    b.replaceChildren(small)
  }
}

function listen() {
  for (const b of root.querySelectorAll('[data-image]'))
    b.addEventListener('click', () => { choose(b); look(b.dataset.image) })
  part('file').addEventListener('change', e => { if (e.target.files[0]) { choose(null); look(e.target.files[0]) } })
  for (const name of ['steps', 'tol']) part(name).addEventListener('input', () => { labels(); play(shown) })
  part('score').addEventListener('input', () => { labels(); draw(shown, shown, 1); tell(shown) })
  part('again').addEventListener('click', () => play())
  root.addEventListener('dragover', e => e.preventDefault())
  root.addEventListener('drop', e => {
    e.preventDefault()
    if (e.dataTransfer.files[0]) { choose(null); look(e.dataTransfer.files[0]) }
  })
}

async function begin() {
  labels()
  say('Loading the detector (8 MB) and its runtime (14 MB) ...')
  try {
    tools = await import('./detector.js')
    detector = await tools.openDetector()
  } catch (e) {
    root.dataset.state = 'failed'
    return say(location.protocol==='file:'
      ? 'A browser loads the detector only from a web server: python -m http.server -d _docs'
      : `The files of the detector are missing here (${e.message}). \`make playground\` makes them.`)
  }
  thumbnails()
  listen()
  const first = root.querySelector('[data-image]')
  choose(first)
  await look(first.dataset.image)
}

begin()
