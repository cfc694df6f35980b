import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import { parse, stringify } from 'yaml';

import { parsePlainYaml } from '../../../src/format/plain-yaml.js';

const SAMPLE = `b2: repository
version: 1
id: 6e8cafa5fe074cc2dd57fc0a45393952
created: 2026-11-22T19:08:55.827Z
keys:
  - id: b62bcc27186d46d3
    label: the password of ops
    N: 131072
    salt: 60YF1MaMCJVjOiQX6FEQpuV3oo+wCWV2/LVMIQrny48=
  - id: "1234567890123456"
    label: ""
mac: rspRXuTEVDuylrsLdY9wTZ2JzOKR2poKQAdKVYs5jJo=
`;

describe('parsePlainYaml', () => {
  it('reads what a configuration looks like', () => {
    expect(parsePlainYaml(SAMPLE)).toEqual(parse(SAMPLE));
    expect(parsePlainYaml(SAMPLE)).toMatchObject({
      version: 1,
      keys: [{ N: 131_072 }, { id: '1234567890123456', label: '' }],
    });
  });

  it.each([
    ['no line end', 'a: b'],
    ['a comment', 'a: b # c\n'],
    ['a comment line', '# c\na: b\n'],
    ['a document marker', '---\na: b\n'],
    ['a carriage return', 'a: b\r\n'],
    ['a null', 'a:\n'],
    ['a null in a list', 'a:\n  - b:\n'],
    ['an empty list before another key', 'a:\nb: c\n'],
    ['a key twice', 'a: b\na: c\n'],
    ['a key twice in an item', 'a:\n  - b: c\n    b: d\n'],
    ['a flow mapping', 'a: {b: c}\n'],
    ['an escape', 'a: "\\u0041"\n'],
    ['a single quote', "a: 'b'\n"],
    ['an anchor', 'a: &x b\n'],
    ['a tag', 'a: !!str b\n'],
    ['a continued scalar', 'a: b\n  c\n'],
    ['an item of another kind', 'a:\n  - b\n'],
    ['an item without a list', '    a: b\n'],
    ['an item after another key', 'a:\n  - b: c\nd: e\n    f: g\n'],
    ['a mapping in a mapping', 'a:\n    b: c\n'],
    ['a colon at the end', 'a: b:\n'],
    ['a mapping in a scalar', 'a: b c: d\n'],
    ['an empty line', 'a: b\n\n'],
    ['another alphabet', 'a: ä\n'],
    ['a key that JavaScript knows', '__proto__: b\n'],
  ])('leaves %s to the real parser', (_what, text) => {
    expect(parsePlainYaml(text)).toBeUndefined();
  });

  it.each(
    '0 1 01 0x1F 0o17 1.5 1. 1e5 1E5 12e03 +1 -1 .5 .inf null Null NULL ~ true True FALSE yes 1_000 12:30:45 2026-11-22 0b1 nan 1-2 a=b a:b 9007199254740993 999999999999999'.split(
      ' ',
    ),
  )('takes %s for what it is, or for nothing', (text) => {
    const found = parsePlainYaml(`a: ${text}\n`);
    if (found !== undefined) expect(found).toEqual(parse(`a: ${text}\n`));
  });

  it('never differs from the real parser', () => {
    const pieces = [
      'a',
      'b: ',
      'c:',
      '\n',
      '  - ',
      '    ',
      ' ',
      '"',
      '0',
      '1',
      'e',
      '.',
      '-',
      '+',
      ':',
      '#',
      'x',
      'o',
      'true',
      'null',
      '~',
      '/',
      '=',
      '_',
      '\\',
      "'",
      '{',
      '[',
      '&',
      '*',
      '?',
      ',',
    ];
    const piece = fc.constantFrom(...pieces);
    fc.assert(
      fc.property(fc.array(piece, { maxLength: 24 }), (chosen) => {
        const text = `k: ${chosen.join('')}\n`;
        const found = parsePlainYaml(text);
        if (found !== undefined) expect(found).toEqual(parse(text));
      }),
      { numRuns: 5000 },
    );
  });

  it('understands what is written, or leaves it', () => {
    const value = fc.oneof(fc.string(), fc.stringMatching(/^[0-9a-f]{1,32}$/), fc.base64String());
    const scalar = fc.oneof(value, fc.nat());
    const mapping = fc.dictionary(fc.constantFrom('id', 'label', 'N', 'salt', 'kind'), scalar, {
      minKeys: 1,
    });
    let understood = 0;
    fc.assert(
      fc.property(mapping, fc.array(mapping, { minLength: 1, maxLength: 3 }), (head, keys) => {
        const text = stringify({ ...head, keys }, { lineWidth: 0 });
        const found = parsePlainYaml(text);
        if (found === undefined) return;
        understood++;
        expect(found).toEqual({ ...head, keys });
      }),
    );
    expect(understood).toBeGreaterThan(0);
  });
});
