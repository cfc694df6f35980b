/** Colours and weights for text; {@link plainStyle} where nobody would see them. */

export interface Style {
  bold(text: string): string;
  dim(text: string): string;
  red(text: string): string;
  green(text: string): string;
  yellow(text: string): string;
  cyan(text: string): string;
}

const same = (text: string): string => text;

export const plainStyle: Style = {
  bold: same,
  dim: same,
  red: same,
  green: same,
  yellow: same,
  cyan: same,
};

export interface ColourQuestion {
  readonly isTty: boolean;
  readonly json: boolean;
  readonly env: Readonly<Record<string, string | undefined>>;
}

/** True where colours are wanted: a terminal that knows them, no NO_COLOR (no-color.org), no `--json`. */
export function wantsColour({ isTty, json, env }: ColourQuestion): boolean {
  const noColour = env['NO_COLOR'];
  return isTty && !json && (noColour === undefined || noColour === '') && env['TERM'] !== 'dumb';
}

/** The style for a stream; chalk is loaded only when colours are wanted. */
export async function styleFor(question: ColourQuestion): Promise<Style> {
  if (!wantsColour(question)) return plainStyle;
  const { Chalk } = await import('chalk');
  return new Chalk({ level: 1 });
}
