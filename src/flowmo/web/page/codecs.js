// The same image by other codecs, in at most a number of bytes.

import { psnr, readPixels } from "./pixels.js";

// The codecs that this browser can write, or those of the server behind the page, if there is one. Each has the `url` of
// its file, or the file in `blob`.
export async function compareCodecs(image, bytes, engine) {
  if (engine.codecs) return engine.codecs(image, bytes);
  const canvas = new OffscreenCanvas(image.width, image.height);
  canvas.getContext("2d").putImageData(new ImageData(image.pixels, image.width, image.height), 0, 0);
  const out = [];
  for (const [name, type] of [["JPEG", "image/jpeg"], ["WebP", "image/webp"], ["AVIF", "image/avif"]]) {
    const blob = await best((quality) => canvas.convertToBlob({ type, quality }), bytes);
    if (blob.type !== type) continue; // the browser writes PNG instead
    out.push({ name, bytes: blob.size, psnr: psnr(image, await readPixels(blob)), blob });
  }
  return out;
}

// The best quality within `bytes`, or the smallest file.
async function best(write, bytes) {
  let found = await write(0);
  let [low, high] = [0, 1];
  for (let i = 0; i < 7 && found.size <= bytes; i++) {
    const middle = (low + high) / 2;
    const blob = await write(middle);
    if (blob.size <= bytes) [low, found] = [middle, blob];
    else high = middle;
  }
  return found;
}
