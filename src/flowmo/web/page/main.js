// The page: reads an image or a .flowmo file, asks the engine, shows the result.

import { compareCodecs } from "./codecs.js";
import { LocalEngine, RemoteEngine } from "./engine.js";
import { deviation, drawPixels, first, pixelsOf, psnr } from "./pixels.js";

const MAX_PIXELS = 16e6;
const MAX_SIDE = 32767; // of a canvas
const MAX_IDS_SHOWN = 4096;
const MAX_KEPT = 128e6; // bytes of decoded images
const $ = (id) => document.getElementById(id);
const number = (value) => value.toLocaleString("en");
const size = ({ width, height }) => `${number(width)} × ${number(height)}`;

let model, engine;
let source = null; // the file at hand: {name, bitmap} or {name, codes}
let image = null; // original pixels, null for a .flowmo file
let codes = null;
let decoded = null;
let decodings = new Map();
let showing = Promise.resolve(); // until what was chosen last is on the page
let latest = 0;
let running = Promise.resolve();
let pressed = null; // what had the focus before a task
let opening = 0; // files that are being opened; their image replaces the one that is shown
let asked = 0; // changes of what is to be shown

// Text of the task that runs. Buttons wait for it, because a newer task would cancel it.
function busy(text) {
  if (text) document.body.dataset.busy = text;
  else delete document.body.dataset.busy;
  if (text) announce(`${text} …`);
  if (text && document.activeElement !== document.body) pressed = document.activeElement;
  for (const id of ["compare", "draw", "make", "decode-ids"]) $(id).disabled = Boolean(text);
  if (!text && document.activeElement === document.body) pressed?.focus({ preventScroll: true }); // a disabled button loses it
}

// For screen readers: a region that is always there.
function announce(text) {
  $("status").textContent = text;
}

// Tasks run one after another. One ends without a result when a newer one comes.
async function task(text, run) {
  const mine = ++latest;
  const current = () => mine === latest;
  const before = running;
  let finish;
  running = new Promise((resolve) => (finish = resolve));
  await before;
  if (!current()) return finish();
  const report = (share) => current() && ($("progress").value = share);
  $("progress").hidden = false;
  $("progress").removeAttribute("value");
  busy(text);
  try {
    const result = await run(report);
    return current() ? result : undefined;
  } catch (error) {
    if (current()) say(error.message, "error");
  } finally {
    finish();
    if (current()) {
      $("progress").hidden = true;
      busy("");
    }
  }
}

function say(text, kind = "") {
  $("message").textContent = text;
  $("message").className = kind;
  $("message").hidden = !text;
}

// Opening

async function open(file) {
  say("");
  const name = file.name.replace(/\.[^.]*$/, "");
  let bitmap = null;
  opening++;
  const opened = await task("opening", async () => {
    if (!/\.flowmo$/i.test(file.name)) return { name, bytes: file.size, bitmap: (bitmap = await bitmapOf(file)) };
    return { name, codes: await engine.unpack(new Uint8Array(await file.arrayBuffer())) };
  });
  opening--;
  if (!opened) {
    bitmap?.close();
    if (!opening && codes) await show(); // it was no image, and settings may have changed meanwhile
    return;
  }
  source?.bitmap?.close();
  source = opened;
  await start();
}

async function bitmapOf(file) {
  try {
    return await createImageBitmap(file);
  } catch {
    throw new Error(`${file.name} is not an image that this browser reads. Use JPEG, PNG, WebP, AVIF or GIF.`);
  }
}

async function start() {
  for (const id of ["viewer", "files", "more"]) $(id).hidden = true;
  $("details").replaceChildren();
  decodings = new Map();
  codes = image = null; // or a change of settings would decode the last image
  if (source.codes) {
    if (Math.max(source.codes.width, source.codes.height) > MAX_SIDE) {
      return say(`The image has ${size(source.codes)} pixels, and a side has at most ${number(MAX_SIDE)} here. Use flowmo decode.`, "error");
    }
    codes = source.codes;
    if (codes.missing) {
      say(`The file is cut or damaged. ${codes.planes} of ${codes.planes + codes.missing} planes give a coarser image.`);
    }
  } else {
    image = fitted(source.bitmap, $("fit").value);
    codes = await task("encoding", (report) => engine.encode(image, report));
    if (!codes) return;
  }
  $("rate").max = codes.planes;
  $("rate").value = codes.planes;
  $("rates").hidden = model.fewestSubTokens === model.subTokens;
  $("ids").value = idsText();
  await show();
}

// The image at the chosen size, over white.
function fitted(bitmap, fit) {
  const [width, height] = [bitmap.width, bitmap.height];
  const canvas = document.createElement("canvas");
  const most = Math.min(Math.sqrt(MAX_PIXELS / (width * height)), MAX_SIDE / Math.max(width, height));
  const limit = Math.min(fit === "own" ? 1 : Number(fit) / Math.max(width, height), most);
  const scale = fit === "crop" ? model.tile / Math.min(width, height) : Math.min(1, limit);
  const round = scale === most ? Math.floor : Math.round; // the product must stay below MAX_PIXELS
  const [w, h] = [width, height].map((n) => Math.max(round(n * scale), 1));
  canvas.width = fit === "crop" ? model.tile : w;
  canvas.height = fit === "crop" ? model.tile : h;
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.fillStyle = "white";
  context.fillRect(0, 0, w, h);
  context.imageSmoothingQuality = "high";
  context.drawImage(bitmap, Math.round((canvas.width - w) / 2), Math.round((canvas.height - h) / 2), w, h);
  if (fit !== "crop" && scale < 1) {
    say(`The image is shrunk from ${size(bitmap)} to ${size(canvas)} pixels. Choose another size under “Encode”.`);
  }
  return pixelsOf(canvas);
}

// Decoding

function settings() {
  const read = (id, fallback, low, high) => {
    const value = $(id).value.trim() === "" ? fallback : Number($(id).value);
    $(id).value = Math.min(Math.max(Number.isFinite(value) ? value : fallback, low), high);
    return Number($(id).value);
  };
  return {
    steps: Math.round(read("steps", model.steps, 1, 50)),
    seed: Math.round(read("seed", 0, 0, 2 ** 53 - 1)),
    guidance: model.meanVelocity ? 1 : read("guidance", model.guidance, 1, 4),
  };
}

async function decode(planes, change = {}) {
  const request = { planes, ...settings(), ...change };
  const key = JSON.stringify(request);
  const known = decodings;
  if (known.has(key)) return known.get(key);
  const start = performance.now();
  const result = await task("decoding", (report) => engine.decode({ codes, ...request }, report));
  if (!result) return null;
  result.seconds = (performance.now() - start) / 1000;
  known.set(key, result);
  let bytes = 0; // a phone has no room for every rate of a large image
  for (const [old, { pixels }] of [...known].reverse()) if ((bytes += pixels.length) > MAX_KEPT && old !== key) known.delete(old);
  return result;
}

const pause = (milliseconds) => new Promise((resolve) => setTimeout(resolve, milliseconds));

// Shows the codes with the settings of the page, after a pause in which the next change may come.
function show(wait = 0) {
  const mine = ++asked;
  showing = pause(wait).then(() => (mine === asked ? showCodes() : undefined));
  return showing;
}

async function showCodes() {
  if (!codes || opening) return;
  clearGalleries();
  const [shownCodes, planes] = [codes, Number($("rate").value)];
  const current = () => !opening && shownCodes === codes && planes === Number($("rate").value);
  const bytes = await engine.size(codes, planes);
  if (!current()) return;
  const pixels = codes.height * codes.width;
  $("rate-shown").textContent = `${((8 * bytes) / pixels).toFixed(3)} bits per pixel, ${number(bytes)} bytes`;
  const result = await decode(planes);
  if (!result || !current()) return;
  decoded = { ...result, planes, bytes };
  drawPixels($("decoded"), decoded);
  drawPixels($("original"), image ?? decoded);
  $("left").textContent = image ? "original" : "decoded";
  $("side").textContent = `decoded, ${number(bytes)} bytes`;
  $("viewer").hidden = $("files").hidden = $("more").hidden = false;
  const details = { file: `${number(bytes)} bytes`, "bits per pixel": ((8 * bytes) / pixels).toFixed(3), image: size(codes) };
  if (source.bytes) details["your file"] = `${number(source.bytes)} bytes`;
  if (image) details.PSNR = `${psnr(image, decoded).toFixed(2)} dB`;
  details.decoded = `in ${decoded.seconds.toFixed(1)} s`;
  announce(`decoded: ${Object.entries(details).map(([name, value]) => `${name} ${value}`).join(", ")}`);
  $("details").replaceChildren(
    ...Object.entries(details).map(([name, value]) => {
      const row = document.createElement("div");
      row.append(element("dt", name), element("dd", value));
      return row;
    }),
  );
}

// Of the code that was shown before.
function clearGalleries() {
  for (const shown of $("codecs").querySelectorAll("img")) URL.revokeObjectURL(shown.src);
  for (const id of ["codecs", "samples"]) $(id).replaceChildren();
  $("samples-note").textContent = "";
}

function element(kind, text) {
  const node = document.createElement(kind);
  node.textContent = text;
  return node;
}

function figure(node, caption) {
  const out = document.createElement("figure");
  out.append(node, element("figcaption", caption));
  return out;
}

function canvasOf(pixels, label = "Decoded image") {
  const canvas = document.createElement("canvas");
  canvas.setAttribute("role", "img");
  canvas.setAttribute("aria-label", label);
  drawPixels(canvas, pixels);
  return canvas;
}

function download(content, name) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(content);
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
}

// More about one image

async function compare() {
  await showing; // or the new decoding would end the comparison of the old one
  if (!image) return say("A .flowmo file has no original to compress. Open an image.", "error");
  const mine = decoded;
  const { bytes } = mine;
  const others = await task("compressing", () => compareCodecs(image, bytes, engine));
  if (!others) return;
  if (mine !== decoded) return;
  const own = figure(canvasOf(mine), `FlowMo: ${number(bytes)} bytes, ${psnr(image, mine).toFixed(2)} dB`);
  clearGalleries();
  $("codecs").replaceChildren(
    own,
    ...others.map((other) => {
      const shown = new Image();
      shown.src = other.url ?? URL.createObjectURL(other.blob);
      shown.alt = other.name;
      const least = other.bytes > bytes ? ", its least" : "";
      return figure(shown, `${other.name}: ${number(other.bytes)} bytes${least}, ${(other.psnr ?? Infinity).toFixed(2)} dB`);
    }),
  );
}

async function draw() {
  await showing;
  const { seed, steps } = settings();
  const mine = decoded;
  const all = [mine];
  for (let i = 1; i <= 3; i++) {
    const sample = await decode(mine.planes, { seed: seed + i });
    if (!sample || mine !== decoded) return;
    all.push(sample);
  }
  const { map, mean, largest } = deviation(all);
  const why = steps > 1 ? "" : " This model decodes in one step, where the code leaves little to the noise.";
  $("samples-note").textContent =
    `The samples differ by ${mean.toFixed(2)} of 255 levels on average, by ${largest.toFixed(0)} at most.${why}`;
  $("samples").replaceChildren(
    ...all.slice(1).map((sample, i) => figure(canvasOf(sample), `seed ${seed + i + 1}`)),
    figure(canvasOf(map), "where they differ, bright where most"),
  );
}

function shownTokens() {
  const perImage = model.native ? codes.ids.length / codes.planes : model.tokens;
  return Math.min(perImage, Math.floor(MAX_IDS_SHOWN / codes.planes));
}

function idsText() {
  const lines = [];
  for (let token = 0; token < shownTokens(); token++) {
    lines.push(codes.ids.slice(token * codes.planes, (token + 1) * codes.planes).join(" "));
  }
  const what = model.native ? "cells of 16 × 16 pixels" : "tokens of the first tile";
  $("ids-note").textContent = `The first ${number(lines.length)} ${what}, one a line. Ids run from 0 to ${model.idCount - 1}.`;
  return lines.join("\n");
}

async function decodeIds() {
  const typed = ($("ids").value.match(/\d+|[^\s\d,;]+/g) ?? []).map(Number);
  const count = shownTokens() * codes.planes;
  if (typed.length !== count) return say(`Type ${number(count)} numbers; here are ${number(typed.length)}.`, "error");
  const wrong = typed.findIndex((id) => !(id < model.idCount));
  if (wrong >= 0) return say(`Number ${number(wrong + 1)} is no id. Ids run from 0 to ${model.idCount - 1}.`, "error");
  say("");
  codes = { ...codes, ids: Int32Array.from(codes.ids) };
  codes.ids.set(typed);
  decodings = new Map();
  await show();
}

async function generate() {
  await showing; // or the new decoding would end it
  const images = await task("generating", () => engine.generate($("class").value, settings().seed));
  $("generated").replaceChildren(...(images ?? []).map((made) => figure(canvasOf(made, "Generated image"), "")));
}

// Setting up

function divide(share) {
  const percent = Math.min(Math.max(share, 0), 1) * 100;
  $("divider").value = percent;
  $("original").style.clipPath = `inset(0 ${100 - percent}% 0 0)`;
  $("line").style.left = `${percent}%`;
}

// Show the error of an event's handler.
function shown(run) {
  return async (event) => {
    try {
      await run(event);
    } catch (error) {
      say(error.message, "error");
    }
  };
}

function connect() {
  const on = (id, event, run) => $(id).addEventListener(event, shown(run));
  on("file", "change", () => {
    const [file] = $("file").files;
    $("file").value = ""; // or the same file, changed, could not be chosen again
    if (file) return open(file);
  });
  for (const event of ["dragover", "dragleave", "drop"]) {
    const dropped = async (e) => {
      e.preventDefault();
      $("drop").classList.toggle("over", event === "dragover");
      if (event === "drop" && e.dataTransfer.files[0]) await open(e.dataTransfer.files[0]);
    };
    document.addEventListener(event, shown(dropped));
  }
  on("fit", "change", () => source?.bitmap && !opening && (say(""), start()));
  on("rate", "input", () => show(150)); // while the slider moves
  for (const id of ["steps", "seed", "guidance"]) on(id, "change", () => codes && show());
  on("divider", "input", () => divide($("divider").value / 100));
  const move = (event) => {
    const box = $("stack").getBoundingClientRect();
    if (event.buttons) divide((event.clientX - box.left) / box.width);
  };
  on("stack", "pointerdown", move);
  on("stack", "pointermove", move);
  on("save", "click", async () => {
    const bytes = await engine.pack(first(codes, decoded.planes));
    download(new Blob([bytes]), `${source.name}.flowmo`);
  });
  on("save-image", "click", () =>
    $("decoded").toBlob((blob) => {
      if (!blob) return say("This browser cannot save so large an image. Use flowmo decode.", "error");
      download(blob, `${source.name}.flowmo.png`);
    }),
  );
  on("compare", "click", compare);
  on("draw", "click", draw);
  on("shuffle", "click", () => {
    $("ids").value = $("ids").value.replace(/\d+/g, () => Math.floor(Math.random() * model.idCount));
  });
  on("decode-ids", "click", decodeIds);
  on("make", "click", generate);
}

function describe() {
  const sizes = [512, 1024, 2048].map((n) => [String(n), `Whole image, up to ${n} pixels`]);
  const crop = model.native ? [] : [["crop", `Central square, ${model.tile} pixels`]];
  const tiles = model.native ? "" : `, in tiles of ${model.tile} pixels`;
  $("fit").append(...[...sizes, ["own", "Whole image, its own size"], ...crop].map(([value, text]) => new Option(text, value)));
  $("about").textContent = `The tokenizer is ${model.name}${tiles}.`;
  $("privacy").textContent = engine.note;
  $("codecs-note").textContent = engine.codecsNote;
  $("steps").value = model.steps;
  $("guidance").value = model.guidance;
  $("guidance").disabled = !model.guided;
  $("rate").min = model.fewestSubTokens;
  for (const name of model.examples ?? []) {
    const preview = Object.assign(new Image(), { src: `examples/${encodeURIComponent(name)}`, alt: name });
    const button = document.createElement("button");
    button.append(preview);
    const choose = async () => {
      const content = await (await fetch(`examples/${encodeURIComponent(name)}`)).blob();
      await open(new File([content], name));
    };
    button.disabled = true; // until the networks are loaded
    button.addEventListener("click", shown(choose));
    $("examples").append(button);
    $("examples").hidden = false;
  }
  if (model.classes) {
    $("class").append(...model.classes.map((name, i) => new Option(name, i)));
    $("generate").hidden = false;
  }
}

// Threads need two headers, which the service worker adds after one reload.
async function secure() {
  if (!navigator.serviceWorker) return;
  await navigator.serviceWorker.register("sw.js");
  await navigator.serviceWorker.ready;
  const reloaded = `reloaded ${location.pathname}`; // other pages of this host reload for themselves
  if (self.crossOriginIsolated || sessionStorage[reloaded]) return;
  sessionStorage[reloaded] = "yes";
  location.reload();
  await pause(5000); // after a forced reload, Chromium ignores this one
}

async function main() {
  model = await (await fetch("model.json", { cache: "no-cache" })).json();
  if (model.files) await secure().catch(() => {}); // private windows have no service worker
  engine = model.files ? new LocalEngine(model) : new RemoteEngine(model);
  describe();
  for (const event of ["dragover", "drop"]) document.addEventListener(event, (e) => e.preventDefault()); // while loading, too
  say("Loading the networks …");
  const loaded = await task("loading", (report) => engine.load(report));
  if (!loaded) return;
  say("");
  connect();
  for (const button of $("examples").children) button.disabled = false;
  if ($("file").files.length) $("file").dispatchEvent(new Event("change")); // chosen while the networks were loading
  document.body.dataset.ready = "yes";
}

main().catch((error) => say(`The page cannot start: ${error.message}`, "error"));
