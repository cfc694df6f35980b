// The thread of src/repo/decode-pool.ts (as built) that dies while it decodes: it has taken its second group, and answers it never.
// B2_TEST_DECODER says how: `exit`: it ends, `throw`: by an error that nothing catches, `hang`: it stops for a while, then goes on.
import '../../dist/repo/decode-worker.js';

const take = Atomics.compareExchange;
const how = process.env.B2_TEST_DECODER;
let taken = 0;
Atomics.compareExchange = (...args) => {
  const before = take(...args);
  if (before !== args[2] || ++taken !== 2) return before;
  if (how === 'exit') process.exit(3);
  if (how === 'throw') throw new TypeError('undefined is not a function');
  Atomics.wait(new Int32Array(new SharedArrayBuffer(4)), 0, 0, 300);
  return before;
};
