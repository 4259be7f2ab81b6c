// Images as {pixels, height, width} with RGBA bytes.

export function pixelsOf(canvas) {
  const { data, height, width } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
  return { pixels: data, height, width };
}

export function drawPixels(canvas, { pixels, height, width }) {
  canvas.height = height;
  canvas.width = width;
  canvas.getContext("2d").putImageData(new ImageData(pixels, width, height), 0, 0);
}

export async function readPixels(blob) {
  const bitmap = await createImageBitmap(blob);
  const canvas = new OffscreenCanvas(bitmap.width, bitmap.height);
  canvas.getContext("2d").drawImage(bitmap, 0, 0);
  return pixelsOf(canvas);
}

export function psnr(one, other) {
  let squares = 0;
  for (let i = 0; i < one.pixels.length; i++) squares += (one.pixels[i] - other.pixels[i]) ** 2; // alpha is equal
  return 10 * Math.log10((255 ** 2 * 0.75 * one.pixels.length) / squares);
}

// The standard deviation of each pixel over images: as an image, and its mean and maximum in levels.
export function deviation(images) {
  const { height, width } = images[0];
  const values = new Float32Array(height * width);
  const count = images.length;
  for (let i = 0; i < values.length; i++) {
    for (let c = 0; c < 3; c++) {
      let [sum, squares] = [0, 0];
      for (const { pixels } of images) {
        const level = pixels[4 * i + c];
        sum += level;
        squares += level * level;
      }
      values[i] += Math.sqrt(Math.max(squares - (sum * sum) / count, 0) / (count - 1)) / 3;
    }
  }
  const largest = values.reduce((a, b) => Math.max(a, b), 0);
  const pixels = new Uint8ClampedArray(4 * values.length).fill(255);
  values.forEach((value, i) => {
    const share = value / (largest || 1);
    pixels.set([255 * Math.min(2 * share, 1), 255 * Math.max(2 * share - 1, 0), 60 * share], 4 * i);
  });
  return { map: { pixels, height, width }, mean: values.reduce((a, b) => a + b, 0) / values.length, largest };
}

// Codes with the first `planes` sub-tokens of every token.
export function first(codes, planes) {
  if (planes === codes.planes) return codes;
  return { ...codes, planes, ids: codes.ids.filter((_, i) => i % codes.planes < planes) };
}
