// Loads the bundled program (scripts/bundle.mjs), with the code that V8 compiled when it was built.
//
// Compiling takes a third of the time to start. From 22.1 on Node.js keeps compiled code itself (bin/b2 turns that on); for older ones
// the build leaves it beside the bundle, for exactly the Node.js that built it (scripts/code-cache.mjs). V8 takes it only where it
// fits, and compiles otherwise; names of files in chunks/ contain a hash of their content, so it is never the code of another file.
'use strict';

const fs = require('fs');
const path = require('path');
const vm = require('vm');
const { crc32 } = require('zlib');
const { pathToFileURL } = require('url');

const CHUNKS = 'chunks';

/** Where the compiled code of the bundle in `bundle` is kept for this Node.js; there may be none. */
function codeCacheOf(bundle) {
  return path.join(bundle, 'code', `${process.version}-${process.arch}`);
}

/** Modules by path, as in require.cache. */
const modules = new Map();
/** What was compiled: for who makes the cache. */
const scripts = new Map();

/** Where compiled code of the chunk `file` is. */
function codeFileOf(file, cache) {
  return path.join(cache, `${path.basename(file)}.bin`);
}

/** As it is kept: V8 believes what it is given, so a checksum is behind it. */
function sealedCode(code) {
  const sum = Buffer.alloc(4);
  sum.writeUInt32LE(crc32(code));
  return Buffer.concat([code, sum]);
}

/** Compiled code of the chunk; undefined where there is none that is whole. */
function readCode(file, cache) {
  let sealed;
  try {
    sealed = fs.readFileSync(codeFileOf(file, cache));
  } catch {
    return undefined;
  }
  const end = sealed.length - 4;
  if (end < 0) return undefined;
  const code = sealed.subarray(0, end);
  return sealed.readUInt32LE(end) === crc32(code) ? code : undefined;
}

function compiled(file, cache) {
  const source = fs.readFileSync(file, 'utf8');
  const cachedData = readCode(file, cache);
  const script = new vm.Script(
    `(function (exports, require, module, __filename, __dirname) { ${source}\n})`,
    // As stack traces show it; the name is in the compiled code, which may have been made elsewhere.
    { filename: path.join('bundle', CHUNKS, path.basename(file)), cachedData },
  );
  scripts.set(file, script);
  return script.runInThisContext();
}

function loadChunk(file, cache) {
  const known = modules.get(file);
  if (known !== undefined) return known.exports;
  const module = { exports: {} };
  modules.set(file, module);
  try {
    const directory = path.dirname(file);
    const requireFrom = (id) => {
      if (id.startsWith('./')) return loadChunk(path.join(directory, id), cache);
      // Packages are found from here as well as from there.
      return require(id.startsWith('.') ? path.join(directory, id) : id);
    };
    compiled(file, cache).call(
      module.exports,
      module.exports,
      requireFrom,
      module,
      file,
      directory,
    );
  } catch (error) {
    modules.delete(file);
    throw error;
  }
  return module.exports;
}

/** The exports of a chunk of the bundle in the directory `bundle`. */
function load(bundle, chunk) {
  const file = path.join(bundle, CHUNKS, chunk);
  const cache = codeCacheOf(bundle);
  return fs.existsSync(cache) ? loadChunk(file, cache) : require(file);
}

/** `import()` by a chunk in `directory`. */
function imported(specifier, directory) {
  if (!specifier.startsWith('.')) return import(specifier);
  return import(pathToFileURL(path.join(directory, specifier)).href);
}

module.exports = { codeCacheOf, codeFileOf, imported, load, scripts, sealedCode };
