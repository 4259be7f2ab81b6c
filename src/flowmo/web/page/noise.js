// Standard normal noise, the numbers that PyTorch draws on a CPU from the same seed: a seed means one image everywhere.

class MersenneTwister {
  constructor(seed) {
    this.state = new Uint32Array(624);
    this.index = 624;
    this.state[0] = seed;
    for (let i = 1; i < 624; i++) {
      const previous = this.state[i - 1] ^ (this.state[i - 1] >>> 30);
      this.state[i] = Math.imul(1812433253, previous) + i;
    }
  }

  next() {
    const { state } = this;
    if (this.index === 624) {
      for (let i = 0; i < 624; i++) {
        const mixed = (state[i] & 0x80000000) | (state[(i + 1) % 624] & 0x7fffffff);
        state[i] = state[(i + 397) % 624] ^ (mixed >>> 1) ^ (mixed & 1 ? 0x9908b0df : 0);
      }
      this.index = 0;
    }
    let y = state[this.index++];
    y ^= y >>> 11;
    y ^= (y << 7) & 0x9d2c5680;
    y ^= (y << 15) & 0xefc60000;
    return (y ^ (y >>> 18)) >>> 0;
  }

  uniform() {
    return (this.next() & 0xffffff) / 0x1000000;
  }
}

// `count` is 16 or more.
export function seededNoise(seed, count) {
  const generator = new MersenneTwister(Number(BigInt(seed) & 0xffffffffn));
  const out = Float32Array.from({ length: count }, () => generator.uniform());
  for (let i = 0; i + 16 <= count; i += 16) boxMuller(out, i);
  if (count % 16) {
    for (let i = count - 16; i < count; i++) out[i] = generator.uniform();
    boxMuller(out, count - 16);
  }
  return out;
}

function boxMuller(out, start) {
  for (let i = start; i < start + 8; i++) {
    const radius = Math.sqrt(-2 * Math.log(1 - out[i]));
    const angle = 2 * Math.PI * out[i + 8];
    out[i] = radius * Math.cos(angle);
    out[i + 8] = radius * Math.sin(angle);
  }
}
