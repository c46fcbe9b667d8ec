// A turnable page of one composition: WebGL 2, no library, nothing loaded from anywhere. Python writes `#scene` (what
// there is, as JSON) and `#data` (its arrays, deflated, in base64); lengths are in mm, coordinates in rasmm.

const scene = JSON.parse(document.getElementById("scene").textContent);
const $ = (id) => document.getElementById(id);

// --- vectors and matrices; matrices are stored column by column, as WebGL takes them

const add = (a, b, k = 1) => a.map((v, i) => v + k * b[i]);
const dot = (a, b) => a[0] * b[0] + a[1] * b[1] + a[2] * b[2];
const cross = (a, b) => [a[1] * b[2] - a[2] * b[1], a[2] * b[0] - a[0] * b[2], a[0] * b[1] - a[1] * b[0]];
const unit = (a) => a.map((v) => v / (Math.hypot(...a) || 1));
const clamp = (v, low, high) => Math.min(Math.max(v, low), high);

function turned(vector, axis, angle) {
  const [c, s] = [Math.cos(angle), Math.sin(angle)];
  const along = dot(axis, vector) * (1 - c);
  const side = cross(axis, vector);
  return vector.map((v, i) => v * c + side[i] * s + axis[i] * along);
}

// --- the arrays

async function unpack() {
  const text = atob($("data").textContent.trim());
  const packed = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i++) packed[i] = text.charCodeAt(i);
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Response(stream).arrayBuffer();
}

const KINDS = { u1: Uint8Array, i1: Int8Array, u2: Uint16Array, u4: Uint32Array, f4: Float32Array };
const arrayOf = (buffer, [kind, at, count]) => new KINDS[kind](buffer, at, count);

// Coordinates come as steps from one point to the next, for each axis the low bytes and then the high bytes.
function positionsOf(buffer, where, width) {
  const bytes = arrayOf(buffer, where);
  const n = bytes.length / 6;
  const out = new Uint16Array(width * n);
  for (let axis = 0; axis < 3; axis++) {
    const low = 2 * axis * n;
    let value = 0;
    for (let i = 0; i < n; i++) {
      value = (value + bytes[low + i] + 256 * bytes[low + n + i]) & 0xffff;
      out[width * i + axis] = value;
    }
  }
  return out;
}

// --- shaders

const WIDE = 4096; // pixels of a texture that holds points

const LINES = [
  `uniform mat4 toEye, toClip;
  uniform highp usampler2D points;
  uniform sampler2D colors;
  uniform vec3 origin;
  uniform vec4 one;
  uniform float step, radius, thickness;
  uniform vec2 size;
  out vec3 color, world, across;
  out float side, shade;
  vec4 onScreen(vec3 point) {
    return toClip * (toEye * vec4(point, 1));
  }
  vec2 towards(vec4 from, vec4 to) {
    vec2 along = (to.xy / to.w - from.xy / from.w) * size;
    return length(along) > 1e-6 ? normalize(along) : vec2(0);
  }
  ivec2 pixelOf(int k) {
    return ivec2(k % ${WIDE}, k / ${WIDE});
  }
  uvec4 pointAt(int k) {
    return texelFetch(points, pixelOf(k), 0);
  }
  vec4 placed(uvec4 point) {
    return onScreen(origin + step * vec3(point.xyz));
  }
  void main() { // six corners of two triangles between a point and the next
    int k = gl_VertexID / 6, corner = gl_VertexID % 6;
    bool second = corner == 2 || corner > 3;
    side = corner == 1 || corner == 3 || corner == 5 ? 1.0 : -1.0;
    uvec4 here = pointAt(k), next = pointAt(k + 1);
    if (here.w == 0u) { // the last one of its streamline
      gl_Position = vec4(2, 2, 2, 1);
      return;
    }
    vec4 from = placed(here), to = placed(next);
    vec2 along = towards(from, to);
    if (radius > 0.0 || thickness > 2.0) { // no gaps where it bends
      uvec4 before = pointAt(max(k - 1, 0));
      if (second && next.w > 0u) along += towards(to, placed(pointAt(k + 2)));
      if (!second && k > 0 && before.w > 0u) along += towards(placed(before), from);
    }
    vec2 normal = length(along) > 1e-6 ? normalize(vec2(-along.y, along.x)) : vec2(0, 1);
    vec4 place = second ? to : from;
    float tube = radius * toClip[1][1] * size.y * 0.5 / place.w;
    float half_ = max(tube, thickness * 0.5);
    shade = radius > 0.0 ? clamp(tube - 0.5, 0.0, 1.0) : 0.0;
    place.xy += normal * side * half_ / size * 2.0 * place.w;
    color = mix(texelFetch(colors, pixelOf(second ? k + 1 : k), 0).rgb, one.rgb, one.a);
    world = origin + step * vec3(second ? next.xyz : here.xyz);
    across = vec3(normal, 0);
    gl_Position = from.w > 0.0 && to.w > 0.0 ? place : vec4(2, 2, 2, 1);
  }`,
  `uniform vec4 slab; // normal of a plane, and how far from it streamlines are drawn; 0: all of them
  uniform float opacity, plane;
  in vec3 color, world, across;
  in float side, shade;
  out vec4 pixel;
  void main() {
    if (slab.w > 0.0 && abs(dot(world, slab.xyz) - plane) > slab.w) discard;
    vec3 normal = across * side + vec3(0, 0, sqrt(max(1.0 - side * side, 0.0)));
    pixel = vec4(mix(color, lit(color, normal), shade), opacity);
  }`,
];

const SURFACES = [
  `uniform mat4 toEye, toClip;
  uniform vec4 one;
  in vec3 corner, normal, cornerColor;
  out vec3 facing, color;
  void main() {
    facing = mat3(toEye) * normal;
    color = mix(cornerColor, one.rgb, one.a);
    gl_Position = toClip * toEye * vec4(corner, 1);
  }`,
  `uniform float opacity;
  in vec3 facing, color;
  out vec4 pixel;
  void main() {
    vec3 normal = normalize(facing);
    pixel = vec4(lit(color, gl_FrontFacing ? normal : -normal), opacity);
  }`,
];

const SLICES = [
  `uniform mat4 toEye, toClip, toTexture;
  uniform vec3 low, high;
  uniform int axis;
  uniform float at;
  out vec3 place;
  void main() {
    vec3 far = vec3(gl_VertexID & 1, gl_VertexID >> 1, 0);
    vec3 share = axis == 0 ? far.zxy : axis == 1 ? far.xzy : far.xyz;
    vec3 world = mix(low, high, share);
    world[axis] = at;
    place = (toTexture * vec4(world, 1)).xyz;
    gl_Position = toClip * toEye * vec4(world, 1);
  }`,
  `uniform highp sampler3D volume;
  uniform vec2 range;
  uniform sampler2D colors;
  in vec3 place;
  out vec4 pixel;
  void main() {
    if (any(lessThan(place, vec3(0))) || any(greaterThan(place, vec3(1)))) discard;
    float ramp = clamp((texture(volume, place).r - range.x) / (range.y - range.x), 0.0, 1.0);
    pixel = texture(colors, vec2((ramp * 255.0 + 0.5) / 256.0, 0.5));
    if (pixel.a < 0.3) discard;
  }`,
];

// Where a plane cuts the surface of a mask: where its values pass one half.
const OUTLINE = [
  SLICES[0],
  `uniform highp sampler3D volume;
  uniform vec4 one;
  uniform float thickness;
  in vec3 place;
  out vec4 pixel;
  void main() {
    if (any(lessThan(place, vec3(0))) || any(greaterThan(place, vec3(1)))) discard;
    float value = texture(volume, place).r - 0.5;
    float away = abs(value) / max(fwidth(value), 1e-6); // in pixels
    pixel = vec4(one.rgb, one.a * clamp(thickness * 0.5 + 0.5 - away, 0.0, 1.0));
    if (pixel.a < 0.02) discard;
  }`,
];

const BALL = [
  `uniform vec2 middle, reach;
  out vec2 place;
  void main() {
    place = vec2(gl_VertexID & 1, gl_VertexID >> 1) * 2.0 - 1.0;
    gl_Position = vec4(middle + place * reach, 0, 1);
  }`,
  `uniform mat3 toWorld;
  uniform bool colored;
  in vec2 place;
  out vec4 pixel;
  void main() {
    float away = length(place);
    if (away > 1.0) discard;
    vec3 normal = vec3(place, sqrt(1.0 - away * away));
    pixel = vec4(colored ? abs(toWorld * normal) : lit(vec3(0.35), normal), smoothstep(1.0, 0.93, away));
  }`,
];

const HEAD = "#version 300 es\nprecision highp float;\nprecision highp int;\n";
const LIGHT = `vec3 lit(vec3 color, vec3 normal) { // by a lamp over the left shoulder of the viewer
    float lamp = max(dot(normal, normalize(vec3(-0.45, 0.5, 0.8))), 0.0);
    return color * (0.42 + 0.68 * lamp) + 0.05 * pow(lamp, 12.0);
  }\n`;

class Program {
  constructor(gl, [vertex, fragment]) {
    this.gl = gl;
    this.handle = gl.createProgram();
    for (const [kind, text] of [
      [gl.VERTEX_SHADER, HEAD + vertex],
      [gl.FRAGMENT_SHADER, HEAD + LIGHT + fragment],
    ]) {
      const shader = gl.createShader(kind);
      gl.shaderSource(shader, text);
      gl.compileShader(shader);
      gl.attachShader(this.handle, shader);
    }
    gl.linkProgram(this.handle);
    if (!gl.getProgramParameter(this.handle, gl.LINK_STATUS)) {
      const logs = gl.getAttachedShaders(this.handle).map((s) => gl.getShaderInfoLog(s));
      throw new Error([gl.getProgramInfoLog(this.handle), ...logs].join(" "));
    }
    this.places = {};
  }

  // Set uniforms by name, of the kind that its value has: a number, [kind, value], or an array of 2, 3, 4, 9 or 16.
  use(values) {
    const gl = this.gl;
    gl.useProgram(this.handle);
    for (const [name, value] of Object.entries(values)) {
      this.places[name] ??= gl.getUniformLocation(this.handle, name);
      const place = this.places[name];
      if (typeof value === "number") gl.uniform1f(place, value);
      else if (value[0] === "int") gl.uniform1i(place, value[1]);
      else if (value.length === 16) gl.uniformMatrix4fv(place, false, value);
      else if (value.length === 9) gl.uniformMatrix3fv(place, false, value);
      else gl[`uniform${value.length}fv`](place, value);
    }
  }

  attribute(name, buffer, { kind = this.gl.FLOAT, normal = false } = {}) {
    const gl = this.gl;
    const place = gl.getAttribLocation(this.handle, name);
    if (place < 0) return;
    gl.bindBuffer(gl.ARRAY_BUFFER, buffer);
    gl.enableVertexAttribArray(place);
    gl.vertexAttribPointer(place, 3, kind, normal, 0, 0);
  }
}

function bufferOf(gl, array, kind = gl.ARRAY_BUFFER) {
  const buffer = gl.createBuffer();
  gl.bindBuffer(kind, buffer);
  gl.bufferData(kind, array, gl.STATIC_DRAW);
  return buffer;
}

// --- what is drawn: each layer has a name that switches it

// A texture of one row of pixels, cut into pieces of equal length.
function rowOf(gl, array, inner, outer, kind) {
  const texture = gl.createTexture();
  const [nb, high] = [array.length / 4, Math.max(Math.ceil(array.length / 4 / WIDE), 1)];
  gl.bindTexture(gl.TEXTURE_2D, texture);
  gl.texStorage2D(gl.TEXTURE_2D, 1, inner, WIDE, high);
  const full = Math.floor(nb / WIDE);
  gl.pixelStorei(gl.UNPACK_ALIGNMENT, 1);
  if (full) gl.texSubImage2D(gl.TEXTURE_2D, 0, 0, 0, WIDE, full, outer, kind, array.subarray(0, 4 * full * WIDE));
  const rest = nb - full * WIDE;
  if (rest) gl.texSubImage2D(gl.TEXTURE_2D, 0, 0, full, rest, 1, outer, kind, array.subarray(4 * full * WIDE));
  for (const side of ["MIN", "MAG"]) gl.texParameteri(gl.TEXTURE_2D, gl[`TEXTURE_${side}_FILTER`], gl.NEAREST);
  return texture;
}

// Segments that look at the viewer: as wide as the screen or, for tubes, the world has them. Of each point its three
// coordinates, and whether a segment leads to the next one; a color in bytes for each, or one for all.
class Segments {
  constructor(gl, program, points, colors, { origin, step }) {
    Object.assign(this, { gl, program, origin, step, count: points.length / 4 - 1 });
    this.points = rowOf(gl, points, gl.RGBA16UI, gl.RGBA_INTEGER, gl.UNSIGNED_SHORT);
    this.one = colors instanceof Uint8Array ? [0, 0, 0, 0] : [...colors, 1];
    const given = colors instanceof Uint8Array ? colors : new Uint8Array(4);
    this.colors = rowOf(gl, given, gl.RGBA8, gl.RGBA, gl.UNSIGNED_BYTE);
  }

  draw(camera, { count = this.count, radius = 0, thickness = 1, opacity = 1, slab = [0, 0, 0, 0], plane = 0 } = {}) {
    const { gl, program, origin, step, one } = this;
    if (count < 1) return;
    const textures = { points: ["int", 1], colors: ["int", 2] };
    program.use({ ...camera, ...textures, origin, step, one, radius, thickness, opacity, slab, plane });
    [this.points, this.colors].forEach((texture, k) => {
      gl.activeTexture(gl.TEXTURE1 + k);
      gl.bindTexture(gl.TEXTURE_2D, texture);
    });
    gl.activeTexture(gl.TEXTURE0);
    gl.drawArrays(gl.TRIANGLES, 0, 6 * Math.min(count, this.count));
  }

  free() {
    for (const texture of [this.points, this.colors]) this.gl.deleteTexture(texture);
  }
}

class Streamlines {
  constructor(gl, program, buffer, told) {
    this.name = told.name;
    this.color = told.color;
    this.radius = told.radius;
    const positions = positionsOf(buffer, told.positions, 4);
    const lengths = arrayOf(buffer, told.lengths);
    this.ends = new Uint32Array(lengths.length + 1);
    let end = 0;
    lengths.forEach((n, i) => {
      for (let k = end; k < end + n - 1; k++) positions[4 * k + 3] = 1;
      end += n;
      this.ends[i + 1] = end;
    });
    this.ranks = told.ranks ? arrayOf(buffer, told.ranks) : null;
    this.segments = new Segments(gl, program, positions, this.colors(buffer, told, positions, lengths), told);
  }

  get nb() {
    return this.ends.length - 1;
  }

  colors(buffer, told, positions, lengths) {
    if (told.paint === "one") return told.rgb;
    const out = new Uint8Array(positions.length);
    if (told.paint === "direction") return byDirection(positions, lengths, out);
    const given = arrayOf(buffer, told.rgb);
    let k = 0;
    lengths.forEach((n, i) => {
      for (let j = 0; j < n; j++, k++) {
        const from = 3 * (told.paint === "line" ? i : k);
        out.set(given.subarray(from, from + 3), 4 * k);
      }
    });
    return out;
  }

  // How many of this part are drawn, if the first `limit` of its tractogram are.
  drawn(limit) {
    if (!this.ranks) return Math.min(limit, this.nb);
    let [low, high] = [0, this.nb];
    while (low < high) {
      const middle = (low + high) >> 1;
      if (this.ranks[middle] < limit) low = middle + 1;
      else high = middle;
    }
    return low;
  }

  draw(camera, { limit, share, thickness, opacity, slab, plane }) {
    const nb = this.drawn(Math.ceil(limit * share));
    const radius = this.radius * thickness;
    this.segments.draw(camera, {
      count: this.ends[nb] - 1,
      radius,
      thickness: this.radius ? 1 : thickness,
      opacity,
      slab,
      plane,
    });
  }
}

// The color of a point is that of the line through its two neighbors.
function byDirection(positions, lengths, out) {
  let start = 0;
  for (const n of lengths) {
    for (let k = start; k < start + n; k++) {
      const [a, b] = [4 * Math.max(k - 1, start), 4 * Math.min(k + 1, start + n - 1)];
      const step = [0, 1, 2].map((i) => Math.abs(positions[b + i] - positions[a + i]));
      const length = Math.hypot(step[0], step[1], step[2]);
      for (let i = 0; i < 3; i++) out[4 * k + i] = length ? Math.round((255 * step[i]) / length) : 128;
    }
    start += n;
  }
  return out;
}

class Surface {
  constructor(gl, program, points, faces, { name, color = null, opacity = 1, colors = null }) {
    Object.assign(this, { gl, program, points, faces, name, color, opacity, count: faces.length });
    this.array = gl.createVertexArray();
    gl.bindVertexArray(this.array);
    program.attribute("corner", bufferOf(gl, points));
    program.attribute("normal", bufferOf(gl, normalsOf(points, faces)));
    if (colors) program.attribute("cornerColor", bufferOf(gl, colors), { kind: gl.UNSIGNED_BYTE, normal: true });
    bufferOf(gl, faces, gl.ELEMENT_ARRAY_BUFFER);
    gl.bindVertexArray(null);
  }

  draw({ toEye, toClip }) {
    const { gl, program, color, opacity } = this;
    program.use({ toEye, toClip, one: color ? [...color, 1] : [0, 0, 0, 0], opacity });
    gl.bindVertexArray(this.array);
    if (opacity < 1) {
      gl.enable(gl.CULL_FACE);
      gl.depthMask(false);
    }
    gl.drawElements(gl.TRIANGLES, this.count, gl.UNSIGNED_INT, 0);
    gl.disable(gl.CULL_FACE);
    gl.depthMask(true);
    gl.bindVertexArray(null);
  }
}

function normalsOf(points, faces) {
  const out = new Float32Array(points.length);
  for (let f = 0; f < faces.length; f += 3) {
    const [a, b, c] = [3 * faces[f], 3 * faces[f + 1], 3 * faces[f + 2]];
    const u = [0, 1, 2].map((i) => points[b + i] - points[a + i]);
    const normal = cross(
      u,
      [0, 1, 2].map((i) => points[c + i] - points[a + i]),
    );
    for (const corner of [a, b, c]) for (let i = 0; i < 3; i++) out[corner + i] += normal[i];
  }
  return out;
}

// A volume on planes of the world, in the values of bytes from 0 to 1.
class Planes {
  constructor(gl, program, buffer, { shape, data, exact, toTexture }) {
    Object.assign(this, { gl, program, toTexture });
    this.texture = gl.createTexture();
    gl.bindTexture(gl.TEXTURE_3D, this.texture);
    gl.pixelStorei(gl.UNPACK_ALIGNMENT, 1);
    gl.texImage3D(gl.TEXTURE_3D, 0, gl.R8, ...shape, 0, gl.RED, gl.UNSIGNED_BYTE, arrayOf(buffer, data));
    for (const side of ["S", "T", "R"]) gl.texParameteri(gl.TEXTURE_3D, gl[`TEXTURE_WRAP_${side}`], gl.CLAMP_TO_EDGE);
    const filter = exact ? gl.NEAREST : gl.LINEAR;
    gl.texParameteri(gl.TEXTURE_3D, gl.TEXTURE_MIN_FILTER, filter);
    gl.texParameteri(gl.TEXTURE_3D, gl.TEXTURE_MAG_FILTER, filter);
  }

  draw({ toEye, toClip }, position, axes, values) {
    const { gl, program, toTexture } = this;
    const [low, high] = scene.box;
    gl.bindTexture(gl.TEXTURE_3D, this.texture);
    for (const axis of axes) {
      const where = { low, high, axis: ["int", axis], at: position[axis] };
      program.use({ toEye, toClip, toTexture, ...where, volume: ["int", 0], ...values });
      gl.drawArrays(gl.TRIANGLE_STRIP, 0, 4);
    }
  }
}

class Slices extends Planes {
  constructor(gl, program, buffer, told) {
    super(gl, program, buffer, told);
    Object.assign(this, { name: told.name, labels: told.labels, values: told.values, window: [...told.window] });
    this.colors = gl.createTexture();
    gl.bindTexture(gl.TEXTURE_2D, this.colors);
    gl.texImage2D(gl.TEXTURE_2D, 0, gl.RGBA8, 256, 1, 0, gl.RGBA, gl.UNSIGNED_BYTE, arrayOf(buffer, told.colors));
    const filter = told.labels ? gl.NEAREST : gl.LINEAR;
    gl.texParameteri(gl.TEXTURE_2D, gl.TEXTURE_WRAP_S, gl.CLAMP_TO_EDGE);
    gl.texParameteri(gl.TEXTURE_2D, gl.TEXTURE_MIN_FILTER, filter);
    gl.texParameteri(gl.TEXTURE_2D, gl.TEXTURE_MAG_FILTER, filter);
  }

  draw(camera, position, axes) {
    const [low, high] = this.values;
    const range = this.window.map((v) => (v - low) / (high - low));
    const { gl } = this;
    gl.activeTexture(gl.TEXTURE1);
    gl.bindTexture(gl.TEXTURE_2D, this.colors);
    gl.activeTexture(gl.TEXTURE0);
    super.draw(camera, position, axes, { range, colors: ["int", 1] });
  }
}

// Sticks in the voxels next to a plane, one voxel of each column.
class Peaks {
  constructor(gl, program, buffer, told) {
    Object.assign(this, { gl, program, told, name: told.name, vectors: arrayOf(buffer, told.vectors), made: "" });
  }

  at(axis, position) {
    const { shape, affine, nb } = this.told;
    const row = affine[axis];
    const sizes = [0, 1, 2].map((k) => Math.hypot(affine[0][k], affine[1][k], affine[2][k]));
    const steepness = sizes.map((size, k) => Math.abs(row[k]) / size);
    const steep = steepness.indexOf(Math.max(...steepness));
    const [p, q] = [0, 1, 2].filter((k) => k !== steep);
    const [ends, colors, voxel] = [[], [], [0, 0, 0]];
    for (voxel[p] = 0; voxel[p] < shape[p]; voxel[p]++) {
      for (voxel[q] = 0; voxel[q] < shape[q]; voxel[q]++) {
        voxel[steep] = Math.round((position - row[3] - voxel[p] * row[p] - voxel[q] * row[q]) / row[steep]);
        if (voxel[steep] < 0 || voxel[steep] >= shape[steep]) continue;
        const first = 3 * nb * (voxel[0] + shape[0] * (voxel[1] + shape[1] * voxel[2]));
        for (let k = first; k < first + 3 * nb; k += 3)
          this.stick(voxel, this.vectors.subarray(k, k + 3), ends, colors);
      }
    }
    const [low, high] = scene.box;
    const step = Math.max(...add(high, low, -1)) / 65000;
    const points = Uint16Array.from(ends, (v, i) => (i % 4 < 3 ? Math.round((v - low[i % 4]) / step) : v));
    return [points, new Uint8Array(colors), { origin: low, step }];
  }

  stick(voxel, vector, ends, colors) {
    const length = Math.hypot(...vector);
    if (!length) return;
    const { affine, half } = this.told;
    const middle = affine.map((r) => r[0] * voxel[0] + r[1] * voxel[1] + r[2] * voxel[2] + r[3]);
    const color = [...vector].map((v) => Math.round(255 * (0.25 + (0.75 * Math.abs(v)) / length)));
    for (const sign of [-1, 1]) {
      ends.push(...middle.map((v, i) => v + (sign * half * vector[i]) / 127), sign < 0 ? 1 : 0);
      colors.push(...color, 255);
    }
  }

  draw(camera, axis, position) {
    const key = `${axis} ${position}`;
    if (key !== this.made) {
      this.segments?.free();
      this.segments = new Segments(this.gl, this.program, ...this.at(axis, position));
      this.made = key;
    }
    this.segments.draw(camera, { thickness: 2.5 * (window.devicePixelRatio || 1) });
  }
}

// Surfaces around the middles of voxels, by their radii in the directions of a ball.
function glyphSurface(gl, program, buffer, told, plane) {
  const directions = arrayOf(buffer, told.directions);
  const ball = arrayOf(buffer, told.faces);
  const [middles, radii] = [arrayOf(buffer, plane.middles), arrayOf(buffer, plane.radii)];
  const nb = directions.length / 3;
  const points = new Float32Array(radii.length * 3);
  const colors = new Uint8Array(radii.length * 3);
  const faces = new Uint32Array((ball.length * radii.length) / nb);
  for (let m = 0; m < radii.length / nb; m++) {
    for (let k = 0; k < nb; k++) {
      const reach = (radii[m * nb + k] * told.reach) / 255;
      for (let i = 0; i < 3; i++) {
        const to = 3 * (m * nb + k) + i;
        points[to] = middles[3 * m + i] + reach * directions[3 * k + i];
        colors[to] = Math.round(255 * Math.abs(directions[3 * k + i]));
      }
    }
    for (let k = 0; k < ball.length; k++) faces[m * ball.length + k] = m * nb + ball[k];
  }
  return new Surface(gl, program, points, faces, { name: told.name, colors });
}

// --- the camera

class Camera {
  constructor(aspect) {
    this.aspect = aspect;
  }

  // Look along a view so that all points just fit, as the still does.
  aim(name) {
    this.view = name;
    const seen = [...scene.outline, ...(scene.letters ? Object.values(scene.places[name]) : [])];
    const view = scene.views[name];
    this.forward = unit(view.forward);
    this.right = unit(cross(this.forward, view.up));
    this.up = cross(this.right, this.forward);
    const [low, high] = [Math.min, Math.max].map((f) => [0, 1, 2].map((i) => f(...seen.map((p) => p[i]))));
    this.target = add(low, high).map((v) => v / 2);
    this.factor = view.fov ? 0.5 / Math.tan((view.fov * Math.PI) / 360) : 0;
    const k = this.factor ? 1 / (this.factor * (1 + this.aspect)) : 0;
    let [width, height] = [0, 0];
    for (const point of seen) {
      const away = add(point, this.target, -1).map((v) => v * 1.07);
      width = Math.max(width, 2 * (Math.abs(dot(away, this.right)) - k * this.aspect * dot(away, this.forward)));
      height = Math.max(height, 2 * (Math.abs(dot(away, this.up)) - k * dot(away, this.forward)));
    }
    this.height = Math.max(height, width / this.aspect);
  }

  // As a live view left it.
  set(state) {
    Object.assign(this, { ...state, height: state.height * Math.max(1, state.aspect / this.aspect) });
  }

  turn(x, y) {
    this.forward = unit(turned(turned(this.forward, this.up, -x), this.right, -y));
    this.up = unit(turned(turned(this.up, this.up, -x), this.right, -y));
    this.right = unit(cross(this.forward, this.up));
    this.up = cross(this.right, this.forward);
  }

  pan(x, y) {
    this.target = add(add(this.target, this.right, -x * this.height), this.up, y * this.height);
  }

  zoom(times) {
    this.height *= times;
  }

  matrices(size) {
    const { right, up, forward, height, aspect, factor } = this;
    const distance = factor ? (factor * height * (1 + aspect)) / 2 : 0;
    const eye = add(this.target, forward, -distance);
    const back = forward.map((v) => -v);
    const toEye = [0, 1, 2].flatMap((i) => [right[i], up[i], back[i], 0]);
    toEye.push(-dot(right, eye), -dot(up, eye), -dot(back, eye), 1);
    const reach =
      Math.hypot(...add(scene.box[1], scene.box[0], -1)) + Math.hypot(...add(this.target, scene.box[0], -1));
    const [near, far] = [factor ? Math.max(distance - reach, distance / 100) : -reach, distance + reach];
    const [x, y] = [2 / (height * aspect), 2 / height];
    const toClip = factor
      ? [x * distance, 0, 0, 0, 0, y * distance, 0, 0, 0, 0, -(far + near) / (far - near), -1]
      : [x, 0, 0, 0, 0, y, 0, 0, 0, 0, -2 / (far - near), 0];
    toClip.push(...(factor ? [0, 0, (-2 * far * near) / (far - near), 0] : [0, 0, -(far + near) / (far - near), 1]));
    return { toEye, toClip, size };
  }

  // Where a point is in the picture: shares of its width and height from the upper left.
  project(point, { toEye, toClip }) {
    const times = (m, v) => [0, 1, 2, 3].map((i) => v.reduce((sum, x, k) => sum + m[4 * k + i] * x, 0));
    const [x, y, , w] = times(toClip, times(toEye, [...point, 1]));
    return [0.5 + x / w / 2, 0.5 - y / w / 2];
  }
}

// --- the page

const ALONG = { sagittal: 0, coronal: 1, axial: 2 };

class Page {
  constructor(canvas, gl, buffer) {
    Object.assign(this, { canvas, gl, share: 1, moving: false });
    this.position = [...scene.position];
    this.hidden = new Set(scene.hidden);
    this.limit = scene.limit;
    this.thickness = scene.thickness;
    this.slab = scene.slab;
    this.opacity = scene.opacity;
    this.axes = new Set(scene.axes); // of the planes in 3d
    const texts = [LINES, SURFACES, SLICES, OUTLINE, BALL];
    const [lines, surfaces, slices, outline, ball] = texts.map((text) => new Program(gl, text));
    this.ball = ball;
    this.slices = scene.volumes.map((told) => new Slices(gl, slices, buffer, told));
    this.lines = scene.lines.map((told) => new Streamlines(gl, lines, buffer, told));
    this.peaks = scene.peaks.map((told) => new Peaks(gl, lines, buffer, told));
    this.surfaces = scene.surfaces.map((told) => {
      const points = Float32Array.from(
        positionsOf(buffer, told.positions, 3),
        (v, i) => told.origin[i % 3] + told.step * v,
      );
      const surface = new Surface(gl, surfaces, points, arrayOf(buffer, told.faces), told);
      return Object.assign(surface, { outline: new Planes(gl, outline, buffer, told.mask) });
    });
    this.glyphs = scene.glyphs.map((told) =>
      Object.fromEntries(
        Object.entries(told.planes).map(([name, plane]) => [name, glyphSurface(gl, surfaces, buffer, told, plane)]),
      ),
    );
    this.camera = new Camera(1);
    this.resize();
    this.camera.aim(scene.view);
    if (scene.camera) this.camera.set(scene.camera);
  }

  get axis() {
    return ALONG[this.camera.view] ?? 2;
  }

  // The smallest share of streamlines while something moves.
  get least() {
    return Math.min(200 / Math.max(this.limit, 1), 1);
  }

  get flat() {
    return this.camera.view in ALONG;
  }

  shows(layer) {
    return !this.hidden.has(layer.name);
  }

  resize() {
    const ratio = Math.min(window.devicePixelRatio || 1, 2);
    const { clientWidth: width, clientHeight: height } = this.canvas;
    [this.canvas.width, this.canvas.height] = [width, height].map((v) => Math.max(Math.round(v * ratio), 1));
    this.ratio = ratio;
    this.camera.aspect = this.canvas.width / this.canvas.height;
  }

  redraw() {
    this.asked ??= requestAnimationFrame(() => {
      this.asked = null;
      this.draw();
    });
  }

  draw() {
    const { gl, canvas, camera, position } = this;
    const size = [canvas.width, canvas.height];
    const matrices = camera.matrices(size);
    gl.viewport(0, 0, ...size);
    gl.clearColor(...scene.dark, 1);
    gl.clear(gl.COLOR_BUFFER_BIT | gl.DEPTH_BUFFER_BIT);
    gl.enable(gl.BLEND);
    gl.blendFuncSeparate(gl.SRC_ALPHA, gl.ONE_MINUS_SRC_ALPHA, gl.ONE, gl.ONE_MINUS_SRC_ALPHA);
    gl.enable(gl.DEPTH_TEST);
    gl.depthFunc(gl.LEQUAL);
    gl.depthMask(!this.flat);
    for (const slices of this.slices) {
      if (this.shows(slices)) slices.draw(matrices, position, this.flat ? [this.axis] : this.axes);
    }
    gl.depthMask(true);
    this.drawLines(matrices);
    for (const peaks of this.peaks) {
      if (this.shows(peaks)) peaks.draw(matrices, this.axis, position[this.axis]);
    }
    for (const glyphs of this.glyphs) {
      const surface = glyphs[this.flat ? camera.view : "axial"];
      if (surface && this.shows(surface)) surface.draw(matrices);
    }
    for (const surface of this.surfaces) {
      if (!this.shows(surface)) continue;
      if (this.flat) this.drawOutline(surface, matrices);
      else surface.draw(matrices);
    }
    this.drawMarks(matrices);
  }

  drawLines(matrices) {
    const told = {
      limit: this.limit,
      slab: [0, 1, 2].map((k) => (k === this.axis ? 1 : 0)).concat(this.slab),
      plane: this.position[this.axis],
      share: this.moving ? this.share : 1,
      thickness: this.thickness * (scene.lines.some((l) => l.radius) ? 1 : this.ratio),
      opacity: this.opacity,
    };
    this.gl.depthMask(this.opacity === 1); // else what lies behind is seen, in whatever order
    for (const lines of this.lines) if (this.shows(lines)) lines.draw(matrices, told);
    this.gl.depthMask(true);
  }

  drawOutline(surface, matrices) {
    const { gl, position, axis, ratio } = this;
    gl.disable(gl.DEPTH_TEST);
    surface.outline.draw(matrices, position, [axis], { one: [...surface.color, 1], thickness: 2 * ratio });
    gl.enable(gl.DEPTH_TEST);
  }

  // Letters and bar, over the picture; the ball that shows how the head is turned, in it.
  drawMarks(matrices) {
    const { canvas, camera, flat } = this;
    const [width, height] = [canvas.clientWidth, canvas.clientHeight];
    const marks = scene.letters ? this.letters(matrices) : [];
    const ball = scene.letters && (!flat || scene.byDirection);
    const [x, y, radius] = [width - 41, height - 41, 17];
    if (ball) {
      const toWorld = [...camera.right, ...camera.up, ...camera.forward.map((v) => -v)];
      const place = {
        middle: [(2 * x) / width - 1, 1 - (2 * y) / height],
        reach: [(2 * radius) / width, (2 * radius) / height],
      };
      this.gl.disable(this.gl.DEPTH_TEST);
      this.ball.use({ ...place, toWorld, colored: ["int", scene.byDirection ? 1 : 0] });
      this.gl.drawArrays(this.gl.TRIANGLE_STRIP, 0, 4);
      [..."LRPAIS"].forEach((text, k) => {
        const axis = k >> 1;
        const away = (k % 2 ? 1.7 : -1.7) * radius;
        const at = [x + away * camera.right[axis], y - away * camera.up[axis]];
        if (!flat && Math.abs(camera.forward[axis]) < 0.85) marks.push({ text, at, kind: "ball" });
      });
    }
    this.marks = marks;
    $("marks").replaceChildren(
      ...marks.map(({ text, at, kind = "", color = "" }) => {
        const span = document.createElement("span");
        Object.assign(span, { textContent: text, className: kind });
        Object.assign(span.style, { left: `${at[0]}px`, top: `${at[1]}px`, color });
        return span;
      }),
    );
    $("bar").hidden = !(scene.letters && flat);
    $("bar").style.width = `${(20 / camera.height) * height}px`;
  }

  letters(matrices) {
    const { canvas, camera, flat } = this;
    return Object.entries(scene.places[camera.view]).map(([text, place]) => {
      const [x, y] = camera.project(place, matrices);
      const own = [0, 1, 2].map((k) => 0.45 + 0.55 * ("LRPAIS".indexOf(text) >> 1 === k));
      const color = flat ? "" : `rgb(${own.map((v) => Math.round(255 * v))})`;
      return { text, at: [x * canvas.clientWidth, y * canvas.clientHeight], color };
    });
  }

  // Draw few streamlines, twice, the first time shaders are made ready: how long that takes says how many this
  // computer can draw.
  measure() {
    const { gl } = this;
    const total = this.lines.reduce((sum, l) => sum + l.segments.count, 0);
    const share = Math.min(30_000 / Math.max(total, 1), 1);
    if (share === 1) return;
    Object.assign(this, { share, moving: true });
    const draw = () => {
      const start = performance.now();
      this.draw();
      gl.readPixels(0, 0, 1, 1, gl.RGBA, gl.UNSIGNED_BYTE, new Uint8Array(4)); // waits until it is drawn
      return performance.now() - start;
    };
    draw();
    const whole = draw() / share; // ms, of all
    this.moving = false;
    const part = Math.min(2000 / whole, 1);
    this.limit = Math.max(Math.ceil(this.limit * part), 1);
    this.share = clamp(60 / (whole * part), this.least, 1);
    if (part < 1) {
      scene.notes.push("This computer draws slowly, so fewer streamlines are shown; the slider shows more.");
    }
  }

  // While something moves, fewer streamlines if frames take long; all of them a moment after.
  move() {
    const now = performance.now();
    if (this.moving && this.last) {
      const took = now - this.last;
      if (took > 60) this.share = Math.max(this.share * 0.6, this.least);
      else if (took < 25) this.share = Math.min(this.share * 1.15, 1);
    }
    this.last = this.moving ? now : 0;
    this.moving = true;
    clearTimeout(this.timer);
    this.timer = setTimeout(() => this.rest(), 250);
    this.redraw();
  }

  rest() {
    clearTimeout(this.timer);
    this.moving = false;
    this.last = 0;
    this.redraw();
  }

  look(name) {
    this.camera.aim(name);
    this.redraw();
    showView(name);
  }

  // The picture as it is, with its letters, as a PNG.
  picture() {
    this.rest();
    this.draw();
    const sheet = Object.assign(document.createElement("canvas"), {
      width: this.canvas.width,
      height: this.canvas.height,
    });
    const pen = sheet.getContext("2d");
    pen.drawImage(this.canvas, 0, 0);
    pen.scale(this.ratio, this.ratio);
    Object.assign(pen, { textAlign: "center", textBaseline: "middle", lineWidth: 3, strokeStyle: "#0c1014" });
    for (const { text, at, kind, color } of this.marks) {
      pen.font = kind ? "bold 11px sans-serif" : "bold 17px sans-serif";
      pen.fillStyle = color || "#dfe5ec";
      pen.strokeText(text, ...at);
      pen.fillText(text, ...at);
    }
    if (!$("bar").hidden) {
      pen.fillStyle = "#dfe5ec";
      pen.fillRect(24, this.canvas.clientHeight - 27, $("bar").clientWidth, 3);
      Object.assign(pen, { font: "13px sans-serif", textAlign: "left" });
      pen.fillText("20 mm", 24, this.canvas.clientHeight - 38);
    }
    sheet.toBlob((blob) => {
      const link = document.createElement("a");
      Object.assign(link, { href: URL.createObjectURL(blob), download: `${scene.title || "view"}.png` });
      link.click();
      setTimeout(() => URL.revokeObjectURL(link.href), 1000);
    });
  }
}

// --- mouse, touch and keys

function listen(page) {
  const { canvas, camera } = page;
  const held = new Map();
  const spread = () => {
    const [a, b] = [...held.values()];
    return { x: (a.x + b.x) / 2, y: (a.y + b.y) / 2, gap: Math.hypot(a.x - b.x, a.y - b.y) };
  };
  const moved = (event) => {
    if (!held.has(event.pointerId)) return;
    const before = held.size > 1 ? spread() : held.get(event.pointerId);
    const point = { x: event.clientX, y: event.clientY, pans: held.get(event.pointerId).pans };
    held.set(event.pointerId, point);
    const after = held.size > 1 ? spread() : point;
    const [x, y] = [after.x - before.x, after.y - before.y];
    if (held.size > 1 && before.gap) camera.zoom(before.gap / Math.max(after.gap, 1));
    if (held.size > 1 || point.pans) camera.pan(x / canvas.clientHeight, y / canvas.clientHeight);
    else camera.turn(x * 0.006, y * 0.006);
    page.move();
  };
  canvas.addEventListener("pointerdown", (event) => {
    canvas.setPointerCapture(event.pointerId);
    held.set(event.pointerId, { x: event.clientX, y: event.clientY, pans: event.button > 0 || event.shiftKey });
    canvas.classList.add("held");
  });
  canvas.addEventListener("pointermove", moved);
  for (const kind of ["pointerup", "pointercancel"]) {
    canvas.addEventListener(kind, (event) => {
      held.delete(event.pointerId);
      canvas.classList.remove("held");
      page.rest();
    });
  }
  canvas.addEventListener("contextmenu", (event) => event.preventDefault());
  canvas.addEventListener("dblclick", () => page.look(camera.view));
  canvas.addEventListener(
    "wheel",
    (event) => {
      event.preventDefault();
      const turns = (event.deltaY || event.deltaX) * (event.deltaMode ? 30 : 1);
      if (event.shiftKey) slide(page, page.axis, -Math.sign(turns) * scene.sliceStep);
      else camera.zoom(Math.exp(clamp(turns, -300, 300) * 0.0012));
      page.move();
    },
    { passive: false },
  );
  const keys = {
    ArrowLeft: () => camera.turn(-0.1, 0),
    ArrowRight: () => camera.turn(0.1, 0),
    ArrowUp: () => camera.turn(0, -0.1),
    ArrowDown: () => camera.turn(0, 0.1),
    "+": () => camera.zoom(1 / 1.15),
    "-": () => camera.zoom(1.15),
    PageUp: () => slide(page, page.axis, scene.sliceStep),
    PageDown: () => slide(page, page.axis, -scene.sliceStep),
    r: () => page.look(camera.view),
  };
  canvas.addEventListener("keydown", (event) => {
    if (!keys[event.key] || event.ctrlKey || event.metaKey) return;
    event.preventDefault();
    keys[event.key]();
    page.move();
  });
  new ResizeObserver(() => {
    page.resize();
    page.redraw();
  }).observe(canvas);
}

function slide(page, axis, mm) {
  const slider = $(`plane${axis}`);
  if (!slider) return;
  slider.value = page.position[axis] + mm;
  slider.dispatchEvent(new Event("input"));
}

// --- the controls beside the picture

function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

// A slider with its value; `change` is given the number and returns the text of it.
function slider(text, { low, high, step, value, id = "" }, change) {
  const shown = make("span", { className: "value" });
  const input = make("input", { type: "range", min: low, max: high, step, id });
  input.value = value;
  input.setAttribute("aria-label", text);
  const tell = () => {
    shown.textContent = change(Number(input.value));
    input.setAttribute("aria-valuetext", shown.textContent);
  };
  tell();
  input.addEventListener("input", tell);
  return make("label", { className: "slide" }, make("span", { textContent: text }), shown, input);
}

const group = (...children) => make("fieldset", {}, ...children);
const inDigits = (v) => Number(v.toPrecision(3)).toLocaleString("en");

function showView(name) {
  for (const button of $("views").children) button.setAttribute("aria-pressed", String(button.textContent === name));
}

function viewControls(page) {
  const views = make("div", { className: "row", id: "views" });
  for (const name of Object.keys(scene.views)) {
    views.append(make("button", { type: "button", textContent: name, onclick: () => page.look(name) }));
  }
  const button = (textContent, onclick) => make("button", { type: "button", textContent, onclick });
  const full = () =>
    document.fullscreenElement ? document.exitFullscreen() : document.documentElement.requestFullscreen();
  const reset = () => page.look(page.camera.view);
  const rest = make("div", { className: "row" }, button("reset", reset), button("full screen", full));
  rest.append(button("save picture", () => page.picture()));
  rest.style.marginTop = "4px";
  return group(views, rest);
}

function planeControls(page) {
  const sliders = ["sagittal", "coronal", "axial"].map((name, axis) => {
    const [low, high] = scene.frame.map((corner) => corner[axis]);
    const step = (high - low) / 400 || 1;
    return slider(name, { low, high, step, value: page.position[axis], id: `plane${axis}` }, (mm) => {
      page.position[axis] = mm;
      page.move();
      return `${"xyz"[axis]} = ${Math.round(mm)} mm`;
    });
  });
  return group(...sliders, planeSwitches(page));
}

function planeSwitches(page) {
  const boxes = Object.entries(ALONG).map(([name, axis]) => {
    const box = make("input", { type: "checkbox", checked: page.axes.has(axis) });
    box.setAttribute("aria-label", `${name} plane in 3d`);
    box.addEventListener("change", () => {
      if (box.checked) page.axes.add(axis);
      else page.axes.delete(axis);
      page.redraw();
    });
    return make("label", { className: "switch" }, box, make("span", { textContent: "xyz"[axis] }));
  });
  return make("div", { className: "row planes" }, make("span", { textContent: "planes in 3d" }), ...boxes);
}

function greyControls(page) {
  const grey = page.slices.filter((slices) => !slices.labels);
  const [first] = grey;
  const [low, high] = first.values;
  const step = (high - low) / 200;
  const change = (end) => (value) => {
    for (const slices of grey)
      slices.window[end] = end ? Math.max(value, slices.window[0] + step) : Math.min(value, slices.window[1] - step);
    page.redraw();
    return inDigits(value);
  };
  return group(
    slider("black from", { low, high, step, value: first.window[0] }, change(0)),
    slider("white from", { low, high, step, value: first.window[1] }, change(1)),
  );
}

function lineControls(page) {
  const controls = [];
  const most = Math.max(...scene.lines.map((l) => l.limit));
  const told = () => {
    const shown = page.lines.reduce((sum, l) => sum + (page.shows(l) ? l.drawn(page.limit) : 0), 0);
    return `${shown.toLocaleString("en")} of ${scene.total.toLocaleString("en")}`;
  };
  if (most > 1) {
    const counted = slider(
      "streamlines",
      { low: 1, high: most, step: 1, value: Math.min(page.limit, most) },
      (limit) => {
        page.limit = limit;
        page.redraw();
        return told();
      },
    );
    page.recount = () => counted.querySelector("input").dispatchEvent(new Event("input"));
    controls.push(counted);
  }
  controls.push(
    slider("thickness", { low: 0.3, high: 5, step: 0.1, value: page.thickness }, (times) => {
      page.thickness = times;
      page.redraw();
      return `× ${times.toFixed(1)}`;
    }),
  );
  controls.push(
    slider("opacity", { low: 0.05, high: 1, step: 0.05, value: page.opacity }, (share) => {
      page.opacity = share;
      page.redraw();
      return `${Math.round(100 * share)} %`;
    }),
  );
  if (scene.planes) {
    const [low, all] = [1, 41];
    controls.push(
      slider("only near the slice", { low, high: all, step: 1, value: page.slab || all }, (mm) => {
        page.slab = mm < all ? mm : 0;
        page.redraw();
        return mm < all ? `within ${mm} mm` : "off";
      }),
    );
  }
  return group(...controls);
}

function switchControls(page) {
  const names = new Map();
  for (const layer of [...page.lines, ...page.surfaces, ...scene.peaks, ...scene.glyphs, ...page.slices]) {
    if (layer.name && !names.has(layer.name)) names.set(layer.name, layer.color ?? null);
  }
  const boxes = [];
  const change = (name, shown) => {
    if (shown) page.hidden.delete(name);
    else page.hidden.add(name);
    page.recount?.();
    page.redraw();
  };
  const rows = [...names].map(([name, color]) => {
    const box = make("input", { type: "checkbox", checked: !page.hidden.has(name) });
    box.addEventListener("change", () => change(name, box.checked));
    boxes.push([name, box]);
    const dot = make("i");
    if (color) dot.style.background = `rgb(${color.map((v) => Math.round(255 * v))})`;
    return make("label", { className: "switch" }, box, ...(color ? [dot] : []), make("span", { textContent: name }));
  });
  if (rows.length > 3) {
    const all = (shown) => () => {
      for (const [name, box] of boxes) {
        box.checked = shown;
        change(name, shown);
      }
    };
    const button = (textContent, onclick) => make("button", { type: "button", textContent, onclick });
    rows.unshift(make("div", { className: "row" }, button("show all", all(true)), button("hide all", all(false))));
  }
  return group(...rows);
}

function controls(page) {
  const aside = $("controls");
  const text = (words) => make("p", { textContent: words });
  aside.append(make("h1", { textContent: scene.title }), viewControls(page));
  if (page.lines.length) aside.append(lineControls(page));
  if (scene.planes) aside.append(planeControls(page));
  if (page.slices.some((slices) => !slices.labels)) aside.append(greyControls(page));
  aside.append(switchControls(page));
  const help =
    "Drag turns, shift and drag moves, the wheel zooms, shift and wheel moves the slice; so do one finger and two " +
    "fingers. Arrow keys, + and -, page up and down do the same.";
  aside.append(make("div", { className: "quiet" }, ...scene.notes.map(text), text(help)));
  showView(page.camera.view);
}

async function open() {
  const canvas = $("canvas");
  const gl = canvas.getContext("webgl2", { antialias: true, alpha: false });
  if (!gl) throw new Error("This browser has no WebGL 2, so the scene cannot be turned.");
  if (!window.DecompressionStream) throw new Error("This browser is older than 2023, so the scene cannot be turned.");
  const page = new Page(canvas, gl, await unpack());
  page.measure();
  controls(page);
  listen(page);
  page.draw();
  canvas.addEventListener("webglcontextlost", () => {
    $("message").textContent = "The graphics card dropped the scene. Load the page again.";
  });
  $("still")?.remove();
  document.documentElement.dataset.ready = "yes";
}

open().catch((error) => {
  $("message").textContent = error.message;
});
