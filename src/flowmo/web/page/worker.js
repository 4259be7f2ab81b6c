// Runs encoder and decoder with onnxruntime-web, off the page's thread.
// Messages: {id, call, args} in, {id, result} or {id, error} or {id, progress} out.

import * as ort from "./runtime/ort.wasm.min.js"; // renamed: few servers know .mjs
import { canvasSize, parts } from "./layout.js";
import { seededNoise } from "./noise.js";

const runtime = (ending) => new URL(`runtime/ort-wasm-simd-threaded.${ending}`, import.meta.url).href;
ort.env.wasm.wasmPaths = { mjs: runtime("js"), wasm: runtime("wasm") };
ort.env.wasm.numThreads = self.crossOriginIsolated ? Math.min(navigator.hardwareConcurrency || 1, 8) : 1;

let model;
const sessions = {};

// Reads both networks. Reports bytes read of bytes in total.
async function load(description, report) {
  model = description;
  const files = Object.entries(model.files);
  const total = files.reduce((sum, [, file]) => sum + file.bytes, 0);
  let done = 0;
  for (const [name, file] of files) {
    const address = new URL(`${file.name}?v=${file.hash}`, import.meta.url).href;
    const open = async (cache) => {
      const content = await read(address, cache, file.bytes, (position) => report((done + position) / total));
      if (!(await hash(content)).startsWith(file.hash)) throw new Error("another content");
      sessions[name] = await ort.InferenceSession.create(content, { executionProviders: ["wasm"] });
    };
    try {
      await open("default").catch(() => open("reload")); // the kept copy can be of a download that was cut short
    } catch (error) {
      throw new Error(`${file.name} cannot be loaded (${told(error)}). Reload the page.`);
    }
    done += file.bytes;
  }
  return { threads: ort.env.wasm.numThreads };
}

// A file of so many bytes. Reports bytes read.
async function read(address, cache, size, report) {
  const response = await fetch(address, { cache });
  if (!response.ok) throw new Error(String(response.status));
  const content = new Uint8Array(size);
  let position = 0;
  for (const reader = response.body.getReader(); ; ) {
    const { done, value } = await reader.read();
    if (position + (value?.length ?? 0) > size || (done && position < size)) throw new Error("another length");
    if (done) return content;
    content.set(value, position);
    position += value.length;
    report(position);
  }
}

// SHA-256 in hexadecimal; what was expected where the browser cannot tell, without https.
async function hash(content) {
  if (!crypto.subtle) return { startsWith: () => true };
  return [...new Uint8Array(await crypto.subtle.digest("SHA-256", content))].map((byte) => byte.toString(16).padStart(2, "0")).join("");
}

async function run(name, inputs) {
  const output = await sessions[name].run(inputs);
  return Object.values(output)[0].data;
}

const tensor = (type, data, shape) => new ort.Tensor(type, data, shape);

// A part of a planar image, channels x rows x columns, whose last row and column repeat beyond its size.
function cut(image, [height, width], { down, across }) {
  const rows = down.stop - down.start;
  const columns = across.stop - across.start;
  const out = new Float32Array(3 * rows * columns);
  for (let c = 0, i = 0; c < 3; c++) {
    for (let y = down.start; y < down.stop; y++) {
      const row = (c * height + Math.min(y, height - 1)) * width;
      for (let x = across.start; x < across.stop; x++) out[i++] = image[row + Math.min(x, width - 1)];
    }
  }
  return tensor("float32", out, [1, 3, rows, columns]);
}

// RGBA pixels to ids.
async function encode({ pixels, height, width }, report) {
  const image = new Float32Array(3 * height * width);
  for (let i = 0; i < height * width; i++) {
    for (let c = 0; c < 3; c++) image[c * height * width + i] = pixels[4 * i + c] / 127.5 - 1;
  }
  const all = parts(model, height, width);
  const columns = canvasSize(model, height, width)[1] / model.cell;
  const planes = model.subTokens;
  const ids = model.native
    ? new Int32Array((canvasSize(model, height, width)[0] / model.cell) * columns * planes)
    : new Int32Array(all.length * model.tokens * planes);
  for (const [i, part] of all.entries()) {
    const found = await run("encoder", { images: cut(image, [height, width], part) });
    if (!model.native) ids.set(found, i * model.tokens * planes);
    else keepCore(ids, columns, found, part);
    report((i + 1) / all.length);
  }
  return { height, width, planes, ids };
}

function keepCore(ids, columns, found, { down, across }) {
  const planes = model.subTokens;
  const wide = (across.stop - across.start) / model.cell;
  for (let row = down.first; row < down.last; row++) {
    const from = ((row - down.start / model.cell) * wide + across.first - across.start / model.cell) * planes;
    const line = found.subarray(from, from + (across.last - across.first) * planes);
    ids.set(line, (row * columns + across.first) * planes);
  }
}

// The ids of part `index`; -1 stands for sub-tokens that were not sent.
function idsOf(codes, index, { down, across }, columns, planes) {
  const first = model.native ? down.start / model.cell : 0;
  const rows = model.native ? (down.stop - down.start) / model.cell : 1;
  const left = model.native ? across.start / model.cell : index * model.tokens;
  const wide = model.native ? (across.stop - across.start) / model.cell : model.tokens;
  const out = new Int32Array(rows * wide * model.subTokens).fill(-1);
  for (let token = 0; token < rows * wide; token++) {
    const source = (first + Math.floor(token / wide)) * (model.native ? columns : 0) + left + (token % wide);
    for (let p = 0; p < planes; p++) out[token * model.subTokens + p] = codes.ids[source * codes.planes + p];
  }
  return tensor("int32", out, [1, rows * wide, model.subTokens]);
}

// Euler steps from noise to an image along equation 14, with classifier-free guidance.
async function sample(noise, ids, { steps, guidance }, report) {
  const x = noise.data;
  const condition = model.meanVelocity ? "end" : "keep";
  const one = (value) => tensor("float32", Float32Array.of(value), [1]);
  for (let i = steps; i > 0; i--) {
    const [t, end] = [(i / steps) ** model.rho, ((i - 1) / steps) ** model.rho];
    const inputs = { images: tensor("float32", x, noise.dims), ids, t: one(t) };
    const velocity = await run("decoder", { ...inputs, [condition]: one(model.meanVelocity ? end : 1) });
    if (guidance !== 1 && t >= model.guidanceLow && t <= model.guidanceHigh) {
      const nothing = await run("decoder", { ...inputs, [condition]: one(0) });
      velocity.forEach((v, j) => (velocity[j] = nothing[j] + guidance * (v - nothing[j])));
    }
    for (let j = 0; j < x.length; j++) x[j] -= (t - end) * velocity[j];
    report((steps - i + 1) / steps);
  }
  return x;
}

// Codes to RGBA pixels, from the first `planes` sub-tokens.
async function decode({ codes, planes, seed, steps, guidance }, report) {
  const { height, width } = codes;
  const [rows, columns] = canvasSize(model, height, width);
  const noise = seededNoise(seed, 3 * rows * columns);
  const total = new Float32Array(3 * rows * columns);
  const weights = new Float32Array(rows * columns);
  const all = parts(model, height, width);
  for (const [index, part] of all.entries()) {
    const { down, across } = part;
    const ids = idsOf(codes, index, part, columns / model.cell, planes);
    const settings = { steps, guidance };
    const image = await sample(cut(noise, [rows, columns], part), ids, settings, (share) =>
      report((index + share) / all.length),
    );
    const wide = across.stop - across.start;
    for (let c = 0, i = 0; c < 3; c++) {
      for (let y = 0; y < down.stop - down.start; y++) {
        for (let x = 0; x < wide; x++, i++) {
          const weight = down.weight[y] * across.weight[x];
          const pixel = (down.start + y) * columns + across.start + x;
          total[c * rows * columns + pixel] += weight * Math.max(-1, Math.min(1, image[i]));
          if (!c) weights[pixel] += weight;
        }
      }
    }
  }
  const pixels = new Uint8ClampedArray(4 * height * width).fill(255);
  for (let y = 0; y < height; y++) {
    for (let x = 0; x < width; x++) {
      const from = y * columns + x;
      for (let c = 0; c < 3; c++) {
        pixels[4 * (y * width + x) + c] = (total[c * rows * columns + from] / weights[from] + 1) * 127.5;
      }
    }
  }
  return { pixels, height, width };
}

// The runtime throws bare numbers for errors of its own, which are nearly always those of memory.
function told(error) {
  return typeof error === "number" ? "The memory is short. Choose a smaller size, and reload the page." : String(error?.message || error);
}

const calls = { load, encode, decode };

self.onmessage = async ({ data: { id, call, args } }) => {
  try {
    self.postMessage({ id, result: await calls[call](args, (progress) => self.postMessage({ id, progress })) });
  } catch (error) {
    self.postMessage({ id, error: told(error) });
  }
};
