// How an image of any size becomes inputs of the networks: overlapping tiles, or blocks of a large image at native size
// (flowmo.model.tiling).

const CORE = 32;
const HALO = 8;

// Height and width of the padded image.
export function canvasSize(model, height, width) {
  const padded = (n) => (model.native ? Math.ceil(n / model.cell) * model.cell : Math.max(n, model.tile));
  return [padded(height), padded(width)];
}

function roundHalfEven(x) {
  const low = Math.floor(x);
  return x - low === 0.5 ? low + (low % 2) : Math.round(x);
}

export function tileStarts(length, tile) {
  const overlap = Math.floor(tile / 8);
  const count = Math.max(Math.ceil((length - overlap) / (tile - overlap)), 1);
  return Array.from({ length: count }, (_, i) => roundHalfEven((i * (length - tile)) / Math.max(count - 1, 1)));
}

// Parts of one axis in pixels: computed from `start` to `stop`, ids kept from `first` to `last`, blended by `weight`.
function tileSpans(length, tile) {
  const ramp = Math.max(Math.floor(tile / 8), 1);
  const weight = Float32Array.from({ length: tile }, (_, i) => Math.min(i + 1, tile - i, ramp));
  return tileStarts(length, tile).map((start) => ({ start, stop: start + tile, weight }));
}

function blockSpans(length, cell) {
  const cells = length / cell;
  const cores = [];
  for (let first = 0; first < cells; first += CORE) cores.push([first, Math.min(first + CORE, cells)]);
  return (cells <= CORE + 2 * HALO ? [[0, cells]] : cores).map(([first, last]) => {
    const [from, to] = last - first === cells ? [0, cells] : [Math.max(first - HALO, 0), Math.min(last + HALO, cells)];
    const weight = Float32Array.from({ length: (to - from) * cell }, (_, i) => {
      const position = from + (i + 0.5) / cell;
      const rising = first > 0 ? (position - first) / HALO + 0.5 : 1;
      const falling = last < cells ? (last - position) / HALO + 0.5 : 1;
      return Math.max(Math.min(rising, falling, 1), 0);
    });
    return { start: from * cell, stop: to * cell, first, last, weight };
  });
}

// All parts of an image, row by row: pairs of spans, down and across.
export function parts(model, height, width) {
  const [down, across] = canvasSize(model, height, width).map((length, axis) =>
    model.native ? blockSpans(length, model.cell) : tileSpans([height, width][axis], model.tile),
  );
  return down.flatMap((row) => across.map((column) => ({ down: row, across: column })));
}
