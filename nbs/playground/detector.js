// A detector in three parts (start, step, read) and what feeds it. It computes in this page; nothing is sent anywhere.
import * as ort from './ort.wasm.bundle.min.mjs'

const here = new URL('.', import.meta.url).href
ort.env.wasm.wasmPaths = {wasm: here + 'ort-wasm-simd-threaded.wasm'}
ort.env.wasm.numThreads = 1 // several need headers that a plain web server does not send
ort.env.logLevel = 'error'

async function fetched(name) {
  const answer = await fetch(here + name)
  if (!answer.ok) throw new Error(`${name}: ${answer.status}`)
  return answer
}

// Of every query: corners in pixels of the fed image, score, class
function queries({boxes, scores, labels}) {
  return [...scores.data].map((score, i) =>
    ({box: [...boxes.data.subarray(4*i, 4*i + 4)], score, label: Number(labels.data[i])}))
}

// The detector as three functions, with the names of its classes
export async function openDetector() {
  const about = await (await fetched('about.json')).json()
  const parts = {}
  for (const name of ['start', 'step', 'read']) {
    const bytes = new Uint8Array(await (await fetched(`${name}.onnx`)).arrayBuffer())
    parts[name] = await ort.InferenceSession.create(bytes, {executionProviders: ['wasm']})
  }
  return {
    classes: about.classes,
    side: about.side,

    // An image as `feed` returns it -> the first guess, what it says, and the features that every step reads
    async start({pixels, height, width, side}) {
      const images = new ort.Tensor('uint8', pixels, [1, 3, side, side])
      const sizes = new ort.Tensor('int64', BigInt64Array.from([BigInt(height), BigInt(width)]), [1, 2])
      const {content, xyzr, table, levels, ...said} = await parts.start.run({images, sizes})
      return {state: {content, xyzr}, rows: {table, levels}, found: queries(said)}
    },

    // The next state, and the residuals of contents and of corners
    async step(state, rows) {
      const found = await parts.step.run({...state, ...rows})
      const next = {content: found.next_content, xyzr: found.next_xyzr}
      return {state: next, residual: [...found.residual.data]}
    },

    // What a later state says
    async read(state) { return queries(await parts.read.run(state)) }
  }
}

// States after 0, 1, 2, ... applications, until all residuals are at most `tol` (0: never) or `most` applications are made
export async function* settle(detector, image, most, tol) {
  let {state, rows, found} = await detector.start(image)
  yield {found, residual: null}
  for (let n = 1; n <= most; n++) {
    const next = await detector.step(state, rows)
    state = next.state
    yield {found: await detector.read(state), residual: next.residual}
    if (tol > 0 && Math.max(...next.residual) <= tol) return
  }
}

// ---- images

// Weights with which `n` pixels make pixel `i` of `m`: a triangle, as wide as the pixels of the smaller size
function triangle(n, m, i) {
  const scale = n/m, reach = Math.max(1, scale), centre = (i + .5)*scale
  const first = Math.max(0, Math.trunc(centre - reach + .5)), end = Math.min(n, Math.trunc(centre + reach + .5))
  const weights = []
  for (let j = first; j < end; j++) weights.push(Math.max(0, 1 - Math.abs(j + .5 - centre)/reach))
  const sum = weights.reduce((a, b) => a + b, 0)
  return {first, weights: weights.map(w => w/sum)}
}

// Lines of `n` values, `stride` apart, resized to `m`: bilinear, antialiased, as torchvision does it
function resizeLines(from, n, m, to, starts, stride) {
  for (let i = 0; i < m; i++) {
    const {first, weights} = triangle(n, m, i)
    for (const [a, b] of starts) {
      let sum = 0
      for (let k = 0; k < weights.length; k++) sum += weights[k]*from[a + (first + k)*stride]
      to[b + i*stride] = Math.min(255, Math.max(0, Math.round(sum)))
    }
  }
}

// One channel (h,w) in another size
export function resize(channel, h, w, height, width) {
  if (h===height && w===width) return channel
  const wide = new Uint8Array(h*width), res = new Uint8Array(height*width)
  const rows = Array.from({length: h}, (_, y) => [y*w, y*width])
  resizeLines(channel, w, width, wide, rows, 1)
  const columns = Array.from({length: width}, (_, x) => [x, x])
  resizeLines(wide, h, height, res, columns, width)
  return res
}

// Height and width in a square, as deqdet.sets.augment.fit_hw has them
export function fit(h, w, side) {
  const scale = side/Math.max(h, w)
  return [h, w].map(o => Math.max(1, Math.floor(o*scale + .5)))
}

// What the detector is fed: bytes (3,side,side), channel after channel, padded right and at the bottom
export function feed(rgba, h, w, side) {
  const [height, width] = fit(h, w, side)
  const pixels = new Uint8Array(3*side*side)
  for (let c = 0; c < 3; c++) {
    const channel = new Uint8Array(h*w)
    for (let i = 0; i < h*w; i++) channel[i] = rgba[4*i + c]
    const small = resize(channel, h, w, height, width)
    for (let y = 0; y < height; y++)
      pixels.set(small.subarray(y*width, (y + 1)*width), (c*side + y)*side)
  }
  return {pixels, height, width, side, scale: [width/w, height/h]}
}

// A file or an address: its pixels, and a canvas to show it on
export async function loadImage(source, most = 1200) {
  const blob = source instanceof Blob ? source : await (await fetch(source)).blob()
  const bitmap = await createImageBitmap(blob, {colorSpaceConversion: 'none', premultiplyAlpha: 'none'})
  const {width, height} = bitmap
  const whole = new OffscreenCanvas(width, height).getContext('2d', {willReadFrequently: true})
  whole.drawImage(bitmap, 0, 0)
  const shrink = Math.min(1, most/Math.max(width, height))
  const canvas = document.createElement('canvas')
  canvas.width = Math.max(1, Math.round(width*shrink))
  canvas.height = Math.max(1, Math.round(height*shrink))
  canvas.getContext('2d').drawImage(bitmap, 0, 0, canvas.width, canvas.height)
  return {rgba: whole.getImageData(0, 0, width, height).data, h: height, w: width, canvas}
}
