// The two engines behind the page, with the same calls: encode, decode, pack, unpack.

import { fileSize, pack, unpack } from "./codec.js";
import { first } from "./pixels.js";

// Runs the networks in this browser.
export class LocalEngine {
  note = "Nothing is uploaded. The networks run in this browser and work offline.";
  codecsNote = "JPEG and WebP as this browser writes them. Browsers do not write AVIF; the page of flowmo demo shows it too.";

  constructor(model) {
    this.model = model;
    this.waiting = new Map();
    this.worker = new Worker("worker.js", { type: "module" });
    this.worker.onerror = (event) => {
      this.broken = new Error(`The networks cannot start: ${event.message || "its files cannot be loaded"}.`);
      for (const call of this.waiting.values()) call.reject(this.broken);
    };
    this.worker.onmessage = ({ data: { id, result, error, progress } }) => {
      const call = this.waiting.get(id);
      if (progress !== undefined) return call.report(progress);
      this.waiting.delete(id);
      if (error !== undefined) call.reject(new Error(error));
      else call.resolve(result);
    };
  }

  call(call, args, report = () => {}) {
    const id = crypto.randomUUID ? crypto.randomUUID() : String(Math.random());
    return new Promise((resolve, reject) => {
      if (this.broken) return reject(this.broken);
      this.waiting.set(id, { resolve, reject, report });
      this.worker.postMessage({ id, call, args });
    });
  }

  load = (report) => this.call("load", this.model, report);
  encode = (image, report) => this.call("encode", image, report);
  decode = (request, report) => this.call("decode", request, report);
  size = async (codes, planes) => fileSize(this.model, codes, planes);
  pack = async (codes) => pack(this.model, codes);
  unpack = async (bytes) => unpack(this.model, bytes);
}

// Asks the Python process that serves the page.
export class RemoteEngine {
  note = "The networks run in the Python process that serves this page.";
  codecsNote = "JPEG, WebP, AVIF and JPEG XL, as far as they are installed where the page is served.";

  constructor(model) {
    this.model = model;
  }

  async post(path, body) {
    const response = await fetch(path, { method: "POST", body });
    if (!response.ok) throw new Error(await response.text());
    return response;
  }

  load = async () => ({});

  async encode({ pixels, height, width }) {
    const response = await this.post(`encode?height=${height}&width=${width}`, pixels);
    return unpack(this.model, new Uint8Array(await response.arrayBuffer()));
  }

  async decode({ codes, planes, seed, steps, guidance }) {
    const { height, width } = codes;
    const query = new URLSearchParams({ seed, steps, guidance });
    const response = await this.post(`decode?${query}`, pack(this.model, first(codes, planes)));
    return { pixels: new Uint8ClampedArray(await response.arrayBuffer()), height, width };
  }

  async pack(codes) {
    return new Uint8Array(await (await this.post("pack", pack(this.model, codes))).arrayBuffer());
  }

  size = async (codes, planes) => (await this.pack(first(codes, planes))).length;

  async unpack(bytes) {
    const response = await this.post("unpack", bytes);
    const missing = Number(response.headers.get("FlowMo-Missing"));
    return { ...unpack(this.model, new Uint8Array(await response.arrayBuffer())), missing };
  }

  async codecs({ pixels, height, width }, bytes) {
    const response = await this.post(`codecs?height=${height}&width=${width}&bytes=${bytes}`, pixels);
    return await response.json();
  }

  async generate(label, seed) {
    const response = await this.post(`generate?label=${label}&seed=${seed}`);
    const pixels = new Uint8ClampedArray(await response.arrayBuffer());
    const side = this.model.tile;
    const one = 4 * side * side;
    return [0, 1, 2, 3].map((i) => ({ pixels: pixels.slice(i * one, (i + 1) * one), height: side, width: side }));
  }
}
