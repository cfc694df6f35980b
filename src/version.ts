/** The program's version, from package.json beside bin/, dist/ and src/. */
import { readFileSync } from 'node:fs';
import { B2Error } from './errors.js';

/** As in package.json: "0.1.0". */
export function programVersion(): string {
  const path = new URL('../package.json', import.meta.url);
  const parsed: unknown = JSON.parse(readFileSync(path, 'utf8'));
  if (typeof parsed === 'object' && parsed !== null && 'version' in parsed) {
    if (typeof parsed.version === 'string') return parsed.version;
  }
  throw new B2Error('failed', `${path.pathname} has no version`, { hint: 'Install b2 again.' });
}
